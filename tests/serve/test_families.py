"""Every family and mode over HTTP, its steps shared by two ranks, to an MP4 of what was asked."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bench.clusters import Cluster
from client.client import Client
from models.catalog import load_model
from models.denoise import denoise
from models.spec import Use
from models.stages import load_decoder, load_denoiser, load_encoder
from tests.serve.conftest import read_mp4, until
from training.random_families import RANDOM_FAMILIES

pytestmark = pytest.mark.serve

PROMPT = "a red circle moving right"


@pytest.fixture
def start_image(tmp_path: Path) -> Path:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:40, 16:40] = (200, 30, 30)
    path = tmp_path / "start.png"
    Image.fromarray(pixels).save(path)
    return path


def in_process(folder: Path, fields: dict[str, Any], start_image: Path) -> NDArray[np.uint8]:
    """The frames that one process makes of the request."""
    model = load_model(folder)
    request = model.resolve(fields)
    image = start_image.read_bytes() if model.spec.start_image is Use.REQUIRED else None
    conditioning = load_encoder(model).encode(request, image)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    chunks = load_decoder(model).decode(request, last.latents.numpy())
    return np.concatenate([frames.pixels for frames in chunks])


@pytest.mark.parametrize("family", RANDOM_FAMILIES)
def test_a_family_makes_a_video_on_two_ranks(
    cluster: Cluster,
    random_family: Callable[[str], Path],
    family: str,
    start_image: Path,
    tmp_path: Path,
) -> None:
    client, folder = cluster.client, random_family(family)
    fields: dict[str, Any] = {"prompt": PROMPT, "num_frames": 6, "size": "64x48", "seed": 5}
    has_image = load_model(folder).spec.start_image is Use.REQUIRED
    created = client.create({**fields, "model": family}, start_image if has_image else None)
    events = list(client.follow(created["id"]))
    video = events[-1].data["video"]
    assert video["status"] == "completed", video["error"]
    assert (video["charged"], video["refunded"]) == (video["quoted"], 0)
    steps = [e.data["step"] for e in events if e.data["phase"] == "denoise" and e.data["step"]]
    assert steps == [1, 2]
    path = tmp_path / "video.mp4"
    client.download(created["id"], path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == Fraction(video["fps"])
    pixels = read_mp4(path)
    assert pixels.shape == (6, 48, 64, 3)
    del fields["size"]
    fields |= {"width": 64, "height": 48}
    expected, other = (in_process(folder, {**fields, "seed": seed}, start_image) for seed in (5, 6))
    assert distance(pixels, expected) < distance(pixels, other) / 2


def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of their lightness, on average: colours are stored at half the resolution."""
    return float(np.abs(one.mean(axis=3) - other.mean(axis=3)).mean())


def test_a_lora_changes_its_request_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.client
    fields = {"model": "animatediff", "prompt": PROMPT, "num_frames": 6, "size": "64x48", "seed": 5}
    found = []
    for loras in ([], [{"name": "ink", "weight": 1.0}], []):
        created = client.create({**fields, "loras": loras})
        assert created["loras"] == loras
        assert finish(client, created["id"])["status"] == "completed"
        client.download(created["id"], tmp_path / "video.mp4")
        found.append((tmp_path / "video.mp4").read_bytes())
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_videos_are_changed_and_extended_by_the_families_that_can(
    cluster: Cluster, start_image: Path, tmp_path: Path
) -> None:
    client = cluster.client
    fields = {"num_frames": 6, "size": "64x48", "seed": 5}
    first = client.create({**fields, "model": "animatediff", "prompt": PROMPT})
    assert finish(client, first["id"])["status"] == "completed"
    edit = {"model": "animatediff", "prompt": "a blue box", "video": first["id"], "strength": 0.5}
    changed = client.call("POST", "/v1/videos/edits", json=edit)
    assert finish(client, changed["id"])["status"] == "completed"
    extension = {"model": "svd", "video": first["id"], "num_frames": 4}
    extended = client.call("POST", "/v1/videos/extensions", json=extension)
    assert finish(client, extended["id"])["status"] == "completed"
    found = {}
    for name, video in (("first", first), ("changed", changed), ("extended", extended)):
        client.download(video["id"], tmp_path / f"{name}.mp4")
        found[name] = read_mp4(tmp_path / f"{name}.mp4")
    assert [len(found[name]) for name in ("first", "changed", "extended")] == [6, 6, 10]
    assert distance(found["changed"], found["first"]) > 1
    assert distance(found["extended"][:6], found["first"]) < 4  # encoded once more


def test_a_long_video_is_made_in_windows(cluster: Cluster, tmp_path: Path) -> None:
    fields = {"model": "animatediff", "prompt": PROMPT, "num_frames": 40, "size": "64x48"}
    refused = cluster.client.http.post("/v1/videos", json=fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "num_frames"
    windows = {"context_length": 16, "context_stride": 8}
    created = cluster.client.create({**fields, "free_noise": windows})
    video = finish(cluster.client, created["id"])
    assert (video["status"], video["free_noise"]) == ("completed", windows)
    cluster.client.download(created["id"], tmp_path / "video.mp4")
    assert read_mp4(tmp_path / "video.mp4").shape == (40, 48, 64, 3)


def finish(client: Client, video_id: str) -> dict[str, Any]:
    video: dict[str, Any] = until(client, video_id, lambda event: "video" in event.data)["video"]
    return video
