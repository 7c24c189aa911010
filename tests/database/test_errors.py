"""The table from exception to answer: total, and true for exceptions from other processes."""

import inspect
import pickle
import pkgutil
from importlib import import_module

import pytest

from deployments.errors import ANSWERS, INTERNAL, answer_for
from deployments.origin import PACKAGES
from models.catalog import ModelNotFound
from tests.database.conftest import Door


def test_unknown_paths_and_methods_have_the_envelope(door: Door) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("PUT", "/v1/videos", 405)):
        response = door.client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def our_exceptions() -> list[type[Exception]]:
    found: set[type[Exception]] = set()
    for package in PACKAGES:
        if package == "migrations":
            continue
        root = import_module(package)
        for info in pkgutil.iter_modules(root.__path__, f"{package}."):
            module = import_module(info.name)
            for _, member in inspect.getmembers(module, inspect.isclass):
                if issubclass(member, Exception) and member.__module__ == info.name:
                    found.add(member)
    return sorted(found, key=lambda error: error.__name__)


@pytest.mark.parametrize("error", our_exceptions())
def test_every_exception_of_ours_has_an_answer_and_crosses_processes(
    error: type[Exception],
) -> None:
    if error.__name__ == "DeployFailed":  # ends the launcher, never a request
        return
    assert error in ANSWERS
    num_arguments = 0
    if error.__init__ is not Exception.__init__:
        num_arguments = len(inspect.signature(error.__init__).parameters) - 1
    original = error(*(["1"] * num_arguments if num_arguments else []))
    copied = pickle.loads(pickle.dumps(original))
    assert type(copied) is error
    assert str(copied) == str(original)


def test_a_subclass_answers_like_its_class() -> None:
    class Wrapped(RuntimeError, ModelNotFound):
        """As Ray wraps what crosses an actor."""

    assert answer_for(Wrapped("x")).code == "model_not_found"
    assert answer_for(RuntimeError("x")) is INTERNAL
