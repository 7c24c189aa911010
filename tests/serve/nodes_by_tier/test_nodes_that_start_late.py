"""Clusters of which a node is not known to Ray in time."""

from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from bench.local_nodes import TRIES, local_nodes

pytestmark = [pytest.mark.serve, pytest.mark.long]

HEAD, OTHER = {"num_cpus": 1}, {"num_cpus": 2}
ADD_NODE = Cluster.add_node


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Ray says, one after the other, when a node other than the head is to start."""
    said: list[str] = []

    def add_node(cluster: Cluster, **node: Any) -> Any:
        if cluster.head_node is not None and said:
            raise Exception(said.pop(0))
        return ADD_NODE(cluster, **node)

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr(Cluster, "add_node", add_node)
    return said


def test_another_cluster_starts_in_its_place(
    failing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append("The current node timed out during startup.")
    with local_nodes(HEAD, OTHER):
        assert [node["Alive"] for node in ray.nodes()] == [True, True]
        assert ray.cluster_resources()["CPU"] == 3
    assert "gcs_server.out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "left"),
    [(["it timed out during startup"] * (TRIES + 1), 1), (["no such label", "never asked"], 1)],
    ids=["as often as it is tried", "for another reason"],
)
def test_it_is_told_who_can_not_start(failing: list[str], said: list[str], left: int) -> None:
    failing += said
    with pytest.raises(Exception, match=said[0]), local_nodes(HEAD, OTHER):
        raise AssertionError("there is no cluster")
    assert len(failing) == left
