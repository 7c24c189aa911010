"""One real cluster for all tests here: the shipped configuration and the shipped model."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from bench.clusters import Cluster, add_pair, running_cluster, shipped_config
from client.client import Client, Event
from training.random_checkpoint import write_random_checkpoint
from training.random_controls import RANDOM_CONTROLS, write_random_z_image_control
from training.random_families import RANDOM_FAMILIES, write_random_lora

LEASE_S = 3.0


@pytest.fixture(scope="session")
def control_nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of control networks, by what leads them; that of `depth` is for "pair"."""
    folder = tmp_path_factory.mktemp("controls")
    nets = {
        "canny": RANDOM_CONTROLS["controlnet"],
        "rgb": RANDOM_CONTROLS["sparse-rgb"],
        "scribble": RANDOM_CONTROLS["sparse-scribble"],
    }
    for kind, write in nets.items():
        write(folder / kind)
    return {kind: folder / kind for kind in (*nets, "depth")}


@pytest.fixture(scope="session")
def config_path(
    tmp_path_factory: pytest.TempPathFactory,
    random_family: Callable[[str], Path],
    control_nets: dict[str, Path],
) -> Path:
    """The shipped configuration with a shorter lease, so that a killed pipeline is soon missed, and
    with loopback open to webhooks and image URLs.

    Besides the demo, a random model: "pair" on a tier of two ranks, "single" beside the demo; and
    tiny ones of every family on the two ranks.
    """
    folder = tmp_path_factory.mktemp("config")
    random = folder / "random"
    random.mkdir()
    write_random_checkpoint(random, dim=128, num_layers=2)
    write_random_z_image_control(random / "transformer", control_nets["depth"])
    config = shipped_config()
    guard = {"allow_http": True, "allowed_networks": ["127.0.0.0/8"]}
    config["applications"][0]["args"] |= {
        "leases": {"lease_s": LEASE_S},
        # What a video costs is not to depend on which tests ran before.
        "encoder": {"cache_bytes": 0},
        "webhooks": {"guard": guard},
        "image_urls": guard,
    }
    add_pair(config, random, hang={"least_s": 3.0})
    config["applications"][0]["args"]["models"] += [
        {
            "path": str(random_family(name)),
            "id": name,
            "served_on": [{"tier": "t4"}, {"tier": "local"}],
        }
        for name in RANDOM_FAMILIES
    ]
    write_random_lora(folder / "ink.safetensors")
    config["applications"][0]["args"]["loras"] = [
        {"id": "ink", "path": str(folder / "ink.safetensors")}
    ]
    config["applications"][0]["args"]["controls"] = [
        {"id": f"of {kind}", "path": str(net), "kinds": [kind]}
        for kind, net in control_nets.items()
    ]
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Path]:
    """What the cluster takes for its user's folder and for the one of temporary files."""
    with tempfile.TemporaryDirectory(prefix="m") as folder:  # short: Ray's sockets are named by it
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster(
    config_path: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as shell:
            for name in ("HOME", "TMPDIR"):
                shell.setenv(name, str(elsewhere))
            home = tmp_path_factory.mktemp("home")
            cluster = running.enter_context(running_cluster(config_path, home))
        yield cluster
        children = cluster.process.children(recursive=True)
    assert [child for child in children if child.is_running()] == []
    # The session folder of Ray, and nothing of ours.
    assert [path.name for path in elsewhere.iterdir()] == ["ray"]


def until(client: Client, video_id: str, reached: Callable[[Event], bool]) -> dict[str, Any]:
    """Follow a video's events to the first that satisfies; returns its data."""
    for event in client.follow(video_id):
        if reached(event):
            return event.data
    raise AssertionError("the events ended before")


def read_mp4(path: Path) -> NDArray[np.uint8]:
    """Its frames, [F, H, W, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll a condition that another process brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not come about in time"
        time.sleep(0.05)
