"""Nouns that many tests need."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, make_url

from bench.databases import fresh_database, running_postgresql
from credits.accounts import Account, AccountId, create_account, find_account
from credits.api_keys import add_api_key
from credits.ledger import grant
from credits.plans import Plan
from credits.pricing import Credits
from deployments.database import migrate, open_database, reader
from models.catalog import Model, load_model
from models.request import VideoRequest
from training.random_checkpoint import write_random_checkpoint
from training.random_families import RANDOM_FAMILIES

os.environ.setdefault("RAY_AUTH_MODE", "token")

PEPPER = b"pepper"
ADMIN_KEY = "mk_admin_of_the_tests"


@pytest.fixture(scope="session")
def httpserver_listen_address() -> tuple[str, int]:
    """An address rather than `localhost`, which may be either kind of one."""
    return "127.0.0.1", 0


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random z-image-video checkpoint; copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    write_random_checkpoint(folder, dim=64, num_layers=1)
    return folder


@pytest.fixture(scope="session")
def random_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random checkpoint of RANDOM_FAMILIES; copy it before changing it."""
    folders = tmp_path_factory.mktemp("families")

    @functools.cache
    def write(name: str) -> Path:
        folder = folders / name
        folder.mkdir()
        RANDOM_FAMILIES[name](folder)
        return folder

    return write


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


@pytest.fixture
def a_request(model: Model) -> Callable[..., VideoRequest]:
    """Makes a request of few steps with a fixed seed."""

    def make(**fields: Any) -> VideoRequest:
        return model.resolve({"prompt": "a red circle", "num_steps": 3, "seed": 7, **fields})

    return make


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_template(postgresql_url: str) -> Iterator[str]:
    """The name of a migrated database, to copy for each test."""
    with fresh_database(postgresql_url) as url:
        engine = open_database(url)
        migrate(engine)
        engine.dispose()
        yield str(make_url(url).database)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, to copy for each test."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    engine = open_database(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh database; each test that takes it runs on both kinds."""
    if request.param == "sqlite":
        path = tmp_path / "test.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server = request.getfixturevalue("postgresql_url")
    with fresh_database(server, request.getfixturevalue("postgresql_template")) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def an_account(engine: Engine) -> Callable[..., Account]:
    """Makes an account whose API key is `key-<id>`."""

    def make(
        account_id: str = "alice", *, plan: Plan = Plan.ENTERPRISE, credits: int = 1000
    ) -> Account:
        with engine.begin() as connection:
            create_account(connection, AccountId(account_id), account_id, plan)
            add_api_key(connection, AccountId(account_id), f"key-{account_id}", PEPPER)
            if credits:
                grant(connection, AccountId(account_id), Credits(credits))
        return read_account(engine, account_id)

    return make


def read_account(engine: Engine, account_id: str) -> Account:
    with reader(engine).begin() as connection:
        account = find_account(connection, AccountId(account_id))
    assert account is not None
    return account
