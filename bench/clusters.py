"""Real clusters for tests and benchmarks: launched as a user would, on a free port."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from sqlalchemy import Connection

from client.client import Client, Server
from deployments.database import open_database, reader
from jobs.events import events_after
from jobs.job import Job, JobEvent, JobId, Phase
from jobs.store import get_job

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 20.0
CHECKPOINT_STEPS = 5


@dataclass
class Cluster:
    """A running server, its processes and a client of its local account."""

    process: psutil.Process
    server: Server
    home: Path
    client: Client

    def named(self, title: str) -> list[psutil.Process]:
        """Its processes whose title begins so."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replica processes of a deployment."""
        return self.named(f"ray::ServeReplica:mutoscope:{deployment}")

    def ranks(self, tier: str) -> list[psutil.Process]:
        """The rank processes of a tier's denoiser."""
        return self.named(f"ray::Rank_{tier}")

    def kill(self, deployment: str) -> None:
        """SIGKILL every replica process of a deployment."""
        replicas = self.replicas(deployment)
        assert replicas, f"no process of {deployment} found"
        for process in replicas:
            process.kill()

    def events(self, video_id: str) -> list[JobEvent]:
        """What its database was told of a video."""
        with self._database() as connection:
            return events_after(connection, JobId(video_id), 0)

    def job(self, video_id: str) -> Job:
        """The video's job, as its database has it."""
        with self._database() as connection:
            return get_job(connection, JobId(video_id))

    @contextlib.contextmanager
    def _database(self) -> Iterator[Connection]:
        engine = open_database(f"sqlite:///{self.home / 'mutoscope.db'}")
        with reader(engine).begin() as connection:
            yield connection
        engine.dispose()

    def steps(self, video_id: str) -> list[tuple[int, float]]:
        """Its denoise steps, 0 where it began, and when they were told, in seconds since 1970."""
        return [
            (event.progress.step, event.created_at_ms / 1000)
            for event in self.events(video_id)
            if event.progress.phase is Phase.DENOISE
        ]

    def kill_all(self) -> None:
        """SIGKILL everything at once."""
        family = [self.process, *self.process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, STOP_S)


async def no_pools() -> list[dict[str, Any]]:
    """What an ingress without a cluster says of the pools."""
    return []


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(home: Path) -> dict[str, str]:
    """What a user's shell would hold, with a home folder of its own."""
    ours = ("MUTOSCOPE_", "RAY_", "DATABASE_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "MUTOSCOPE_HOME": str(home)}


def start(config: Path, port: int, home: Path, **arguments: Any) -> "subprocess.Popen[str]":
    """Launch a server; its first line of output says that it is ready."""
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.launch", "--config", str(config), "--port", str(port)],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **arguments,
    )


@contextlib.contextmanager
def running_cluster(config: Path, home: Path) -> Iterator[Cluster]:
    """Start, wait until it is ready, and stop; RuntimeError if it does not start."""
    port = free_port()
    with start(config, port, home) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            if "ready" not in process.stdout.readline():
                process.terminate()
                raise RuntimeError(process.stderr.read())
            for pipe in (process.stdout, process.stderr):  # one that is full stops its writer
                threading.Thread(target=deque, args=(pipe, 0), daemon=True).start()
            server = Server(f"http://127.0.0.1:{port}", (home / "api_key").read_text())
            with Client(server) as client:
                yield Cluster(psutil.Process(process.pid), server, home, client)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_S)


def shipped_config() -> dict[str, Any]:
    """serve_config.yaml."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    return config


def add_pair(config: dict[str, Any], checkpoint: Path, **denoiser: Any) -> None:
    """Add a tier of two ranks and two decoders, with the model "pair" on it, and the same as
    "single" on `local` alone, which also takes what does not fit the two ranks.

    Keyword arguments are entries of the tier's `denoiser` (DenoiserConfig).
    """
    (application,) = config["applications"]
    arguments = application["args"]
    arguments["models"] += [
        {
            "path": str(checkpoint),
            "id": "pair",
            "served_on": [{"tier": "t4"}, {"tier": "local"}],
        },
        {"path": str(checkpoint), "id": "single", "served_on": [{"tier": "local"}]},
    ]
    shared = {"degrees": [2], "checkpoint_steps": CHECKPOINT_STEPS, **denoiser}
    arguments["tiers"].append(
        {
            "tier": "t4",
            "jobs_at_once": 2,
            "torch_threads": 1,
            "larger": "local",
            "denoiser": shared,
            "decoder": {"tile_above_area": 256**2, "chunks_at_once": 2},
        }
    )
    own = {"ray_actor_options": {"num_cpus": 0.01}}
    bundles = {"placement_group_bundles": [{"CPU": 0.01}, {"CPU": 0.05}, {"CPU": 0.05}]}
    by_name = {entry["name"]: entry for entry in application["deployments"]}
    application["deployments"] += [
        by_name["VaeDecoder-local"]
        | own
        | {"name": "VaeDecoder-t4", "autoscaling_config": {"min_replicas": 2, "max_replicas": 2}},
        by_name["Denoiser-local"] | own | bundles | {"name": "Denoiser-t4"},
    ]
