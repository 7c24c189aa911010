"""One real cluster for all tests here: the shipped configuration and the shipped model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from client.client import Client, Event, Server

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 3.0


@dataclass
class Cluster:
    """A running server, its processes and a client of its local account."""

    process: psutil.Process
    server: Server
    home: Path
    client: Client

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replica processes of a deployment."""
        name = f"ray::ServeReplica:mutoscope:{deployment}"
        found = []
        for process in self.process.children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith(name):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, deployment: str) -> None:
        """SIGKILL every replica process of a deployment."""
        replicas = self.replicas(deployment)
        assert replicas, f"no process of {deployment} found"
        for process in replicas:
            process.send_signal(signal.SIGKILL)


def environment(home: Path) -> dict[str, str]:
    """What a user's shell would hold, with a home folder of the test's own."""
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


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    import socket

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped configuration with a shorter lease, so that a killed pipeline is soon missed, and
    with loopback open to webhooks and image URLs.
    """
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    guard = {"allow_http": True, "allowed_networks": ["127.0.0.0/8"]}
    config["applications"][0]["args"] |= {
        "leases": {"lease_s": LEASE_S},
        "webhooks": {"guard": guard},
        "image_urls": guard,
    }
    path = tmp_path_factory.mktemp("config") / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def cluster(
    config_path: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    port = free_port()
    process = start(config_path, port, home)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        ready = process.stdout.readline()
        if "ready" not in ready:
            process.terminate()
            raise RuntimeError(process.stderr.read())
        server = Server(f"http://127.0.0.1:{port}", (home / "api_key").read_text())
        with Client(server) as client:
            yield Cluster(psutil.Process(process.pid), server, home, client)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()
        process.stderr.close()
        assert [child for child in children if child.is_running()] == []


def until(client: Client, video_id: str, reached: Callable[[Event], bool]) -> dict[str, Any]:
    """Follow a video's events to the first that satisfies; returns its data."""
    for event in client.follow(video_id):
        if reached(event):
            return event.data
    raise AssertionError("the events ended before")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll a condition that another process brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not come about in time"
        time.sleep(0.05)
