"""What leads a video over HTTP, on two ranks, ends in the frames that one process makes of it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bench.clusters import Cluster, environment
from media.edges import find_edges
from media.encode import Mp4Encoder
from models.catalog import load_model
from models.control import load_control_net
from models.denoise import denoise
from models.request import ControlKind
from models.stages import load_decoder, load_denoiser, load_encoder
from models.tensors import Frames
from tests.serve.conftest import read_mp4
from tests.serve.test_families import distance, finish

pytestmark = pytest.mark.serve

NUM_FRAMES, SIDE = 5, 64
FIELDS = {"prompt": "a red circle", "num_frames": NUM_FRAMES, "num_steps": 3, "seed": 5}


def moving_square() -> NDArray[np.uint8]:
    pixels = np.full((NUM_FRAMES, SIDE, SIDE, 3), 20, np.uint8)
    for frame in range(NUM_FRAMES):
        pixels[frame, 16:40, 6 * frame : 6 * frame + 24] = (220, 200, 190)
    return pixels


def picture_file(path: Path, pixels: NDArray[np.uint8]) -> Path:
    """One frame as a PNG, more of them as an MP4."""
    if len(pixels) == 1:
        Image.fromarray(pixels[0]).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    through_mp4(path.with_suffix(".mp4"), pixels)
    return path.with_suffix(".mp4")


def through_mp4(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames as the chain would encode them: of noise, that leaves little."""
    with Mp4Encoder(path, width=SIDE, height=SIDE, fps=8, threads=1) as encoder:
        encoder.write(Frames(pixels, 8))
        encoder.finish()
    return read_mp4(path)


def in_process(
    folder: Path, net: Path, control: dict[str, Any], pictures: NDArray[np.uint8], **fields: Any
) -> NDArray[np.uint8]:
    kind = ControlKind(control["type"])
    model = replace(load_model(folder), controls=(load_control_net(net, "net", (kind,)),))
    request = model.resolve({**FIELDS, "width": SIDE, "height": SIDE, "control": control, **fields})
    encoder: Any = load_encoder(model)
    led = encoder.encode_control(request, pictures)
    conditioning = replace(encoder.encode(request, None), control=led)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    chunks = load_decoder(model).decode(request, last.latents.numpy())
    return np.concatenate([frames.pixels for frames in chunks])


@pytest.mark.parametrize(
    ("model", "control", "num_pictures"),
    [
        ("pair", {"type": "depth", "scale": 2.0}, NUM_FRAMES),
        ("animatediff", {"type": "canny", "preprocess": True}, NUM_FRAMES),
        ("animatediff", {"type": "canny"}, 1),
        ("animatediff", {"type": "scribble", "frames": [0, 3]}, 2),
        ("animatediff", {"type": "rgb"}, 1),
    ],
)
def test_a_led_video_is_that_of_one_process(
    cluster: Cluster,
    random_family: Callable[[str], Path],
    control_nets: dict[str, Path],
    config_path: Path,
    model: str,
    control: dict[str, Any],
    num_pictures: int,
    tmp_path: Path,
) -> None:
    client = cluster.client
    pixels = moving_square()[:num_pictures]
    reference = picture_file(tmp_path / "reference", pixels)
    fields = {**FIELDS, "model": model, "size": f"{SIDE}x{SIDE}", "control": control}
    video = finish(client, client.create(fields, control=reference)["id"])
    assert video["status"] == "completed", video["error"]
    assert (video["charged"], video["refunded"]) == (video["quoted"], 0)
    client.download(video["id"], tmp_path / "video.mp4")
    made = read_mp4(tmp_path / "video.mp4")
    if num_pictures > 1:
        pixels = read_mp4(reference)
    if control.get("preprocess"):
        pixels = find_edges(pixels)
    folder = random_family(model) if model == "animatediff" else config_path.parent / "random"
    net = control_nets[control["type"]]
    given = {**control, "frames": video["control"]["frames"]}
    expected = in_process(folder, net, given, pixels)
    free = in_process(folder, net, {**given, "scale": 0}, pixels)
    expected, free = (through_mp4(tmp_path / "x.mp4", pixels) for pixels in (expected, free))
    assert distance(made, expected) < 0.2 * distance(made, free)


def test_animatediff_begins_from_an_image(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.client
    image = picture_file(tmp_path / "start", moving_square()[:1])
    fields = {**FIELDS, "model": "animatediff", "size": f"{SIDE}x{SIDE}"}
    found = []
    for start in (image, None):
        video = finish(client, client.create(fields, start)["id"])
        assert video["status"] == "completed", video["error"]
        client.download(video["id"], tmp_path / "video.mp4")
        found.append((tmp_path / "video.mp4").read_bytes())
    assert found[0] != found[1]


def test_the_command_leads_by_the_edges_of_a_file(cluster: Cluster, tmp_path: Path) -> None:
    reference = picture_file(tmp_path / "reference", moving_square())
    out = tmp_path / "out.mp4"
    command = [
        *(str(Path(sys.executable).with_name("mutoscope")), "generate", "a red circle"),
        *("--model", "animatediff", "--frames", str(NUM_FRAMES), "--size", f"{SIDE}x{SIDE}"),
        *("--control", "canny", "--find-edges", "--control-file", str(reference)),
        *("--control-scale", "0.5", "--out", str(out)),
    ]
    done = subprocess.run(command, env=environment(cluster.home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_mp4(out)) == NUM_FRAMES
    made = cluster.client.call("GET", "/v1/videos")["data"][0]
    control = made["control"]
    assert (control["type"], control["scale"], control["preprocess"]) == ("canny", 0.5, True)
