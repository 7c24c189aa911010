"""Clusters of several nodes on this machine, each node with its own raylet, as Ray's own tests have
them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

STORE_BYTES = 200 << 20
TRIES = 3
LATE = "timed out during startup"
LOGS = ("gcs_server.*", "raylet*", "dashboard_agent.log", "runtime_env_agent.log")
LOG_LINES = 20


@contextmanager
def local_nodes(head: Mapping[str, Any], *others: Mapping[str, Any]) -> Iterator[Cluster]:
    """A head without a dashboard and other nodes, each with what `Cluster.add_node` is told of it;
    this process is the driver.
    """
    cluster = _started(head, others)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def _started(
    head: Mapping[str, Any], others: Sequence[Mapping[str, Any]], tries_left: int = TRIES - 1
) -> Cluster:
    """Ray gives a node 30 s to be known, however busy the machine is, and leaves the processes of
    one that was not. Such a cluster ends with all of its nodes, what they logged is printed, and
    another one is started; the last try's exception is raised.
    """
    cluster = Cluster()
    try:
        cluster.add_node(**head, include_dashboard=False, object_store_memory=STORE_BYTES)
        for node in others:
            cluster.add_node(**node, object_store_memory=STORE_BYTES)
    except Exception as error:  # Ray raises no other class
        if LATE not in str(error):
            cluster.shutdown()
            raise
        _print_logs(cluster, error)
        cluster.shutdown()
        if not tries_left:
            raise
        return _started(head, others, tries_left - 1)
    return cluster


def _print_logs(cluster: Cluster, error: Exception) -> None:
    print(f"a node did not start: {error}", file=sys.stderr)
    if cluster.head_node is None:
        return
    folder = Path(cluster.head_node.get_session_dir_path()) / "logs"
    for path in sorted(path for pattern in LOGS for path in folder.glob(pattern)):
        lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        print(f"--- {path.name}", *lines, sep="\n", file=sys.stderr)
