"""Clusters of several nodes on this machine, each node with its own raylet, as Ray's own tests have
them.
"""

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

STORE_BYTES = 200 << 20
TRIES = 3
LATE = "timed out during startup"
LOGS = ("gcs_server.*", "raylet*", "dashboard_agent.log", "runtime_env_agent.log")
LOG_LINES = 20


@contextlib.contextmanager
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
    """Ray gives a node 30 s to be known, however busy the machine is. If one was not, the cluster
    ends with all of its processes, what they logged is printed, and another one is started; the
    last try's exception is raised.
    """
    here = psutil.Process()
    before = set(here.children(recursive=True))
    cluster = Cluster()
    try:
        cluster.add_node(**head, include_dashboard=False, object_store_memory=STORE_BYTES)
        for node in others:
            cluster.add_node(**node, object_store_memory=STORE_BYTES)
        return cluster
    except Exception as error:  # Ray has no class of its own for a node that is late
        is_late = isinstance(error, TimeoutError) or LATE in str(error)
        if is_late:
            _print_logs(error)
        cluster.shutdown()
        _end(set(here.children(recursive=True)) - before)
        if not is_late or not tries_left:
            raise
    return _started(head, others, tries_left - 1)


def _end(processes: Collection[psutil.Process]) -> None:
    """Those of a node that was late, which the cluster has never heard of."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # its raylet has ended it
            process.kill()
    psutil.wait_procs(processes)


def _print_logs(error: Exception) -> None:
    print(f"a node did not start: {error}", file=sys.stderr)
    # not from the cluster: it may have no head
    folder = Path(get_default_ray_temp_dir()) / "session_latest" / "logs"
    for path in sorted(path for pattern in LOGS for path in folder.glob(pattern)):
        lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        print(f"--- {path.name}", *lines, sep="\n", file=sys.stderr)
