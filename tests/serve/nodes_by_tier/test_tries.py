"""Clusters of which a node is not known to Ray in time."""

from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from bench.local_nodes import TRIES, local_nodes

pytestmark = [pytest.mark.serve, pytest.mark.long]

LATE = "The current node timed out during startup."
HEAD, OTHER = {"num_cpus": 1}, {"num_cpus": 2}
ADD_NODE = Cluster.add_node


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What Ray says, one after the other, of nodes that it has started, of which the cluster has
    not heard then, as in Ray. None, or no more: it is known.
    """
    said: list[str | None] = []

    def add_node(cluster: Cluster, **node: Any) -> Any:
        started = ADD_NODE(cluster, **node)
        error = said.pop(0) if said else None
        if error is not None:
            cluster.worker_nodes.discard(started)
            if cluster.head_node is started:
                cluster.head_node = None
            raise Exception(error)
        return started

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr(Cluster, "add_node", add_node)
    return said


@pytest.mark.parametrize("said", [[LATE], [None, LATE]], ids=["the head", "another"])
def test_another_cluster_starts_in_its_place(
    late: list[str | None], said: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    late += said
    before = set(psutil.Process().children(recursive=True))
    with local_nodes(HEAD, OTHER):
        assert [node["Alive"] for node in ray.nodes()] == [True, True]
        assert ray.cluster_resources()["CPU"] == 3
    assert set(psutil.Process().children(recursive=True)) <= before
    assert "raylet.out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("errors", "tries"),
    [([LATE] * (TRIES + 1), TRIES), (["no such label"] * 2, 1)],
    ids=["as often as it is tried", "for another reason"],
)
def test_it_is_told_who_can_not_start(
    late: list[str | None], errors: list[str], tries: int
) -> None:
    late += errors
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(Exception, match=errors[0]), local_nodes(HEAD, OTHER):
        raise AssertionError("there is no cluster")
    assert set(psutil.Process().children(recursive=True)) <= before
    assert len(late) == len(errors) - tries
