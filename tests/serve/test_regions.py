"""Words for parts of a video over HTTP, on two ranks, end in the frames of one process."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bench.clusters import Cluster
from models.catalog import load_model
from models.denoise import denoise
from models.stages import load_decoder, load_denoiser, load_encoder
from tests.serve.conftest import read_mp4
from tests.serve.test_control import through_mp4
from tests.serve.test_families import distance, finish

pytestmark = pytest.mark.serve

SIDE = 64
FIELDS = {"prompt": "a red circle", "num_frames": 5, "num_steps": 3, "seed": 5}
REGIONS = [
    {"prompt": "a blue box", "box": [0, 0, 32, 64], "frames": [1, 4]},
    {"prompt": "green", "mask": 0},
]


def in_process(folder: Path, masks: NDArray[np.bool_] | None, **fields: Any) -> NDArray[np.uint8]:
    model = load_model(folder)
    request = model.resolve({**FIELDS, "width": SIDE, "height": SIDE, **fields})
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None, region_masks=masks)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    chunks = load_decoder(model).decode(request, last.latents.numpy())
    return np.concatenate([frames.pixels for frames in chunks])


def test_a_video_of_several_texts_is_that_of_one_process(
    cluster: Cluster, config_path: Path, tmp_path: Path
) -> None:
    client = cluster.client
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, 40:] = True
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    fields: dict[str, Any] = {**FIELDS, "model": "pair", "size": f"{SIDE}x{SIDE}"}
    form = {name: str(value) for name, value in fields.items()}
    answer = httpx.post(
        f"{cluster.server.url}/v1/videos",
        headers={"authorization": f"Bearer {cluster.server.api_key}"},
        data={**form, "regions": json.dumps(REGIONS), "seed_variance": '{"strength": 0.2}'},
        files=[("region_masks[]", ("mask.png", content.getvalue()))],
    )
    assert answer.status_code == 200, answer.text
    video = finish(client, answer.json()["id"])
    assert video["status"] == "completed", video["error"]
    client.download(video["id"], tmp_path / "video.mp4")
    made = read_mp4(tmp_path / "video.mp4")
    folder = config_path.parent / "random"
    given = {"regions": video["regions"], "seed_variance": video["seed_variance"]}
    expected = in_process(folder, mask[None, None], **given)
    free = in_process(folder, None)
    expected, free = (through_mp4(tmp_path / "x.mp4", pixels) for pixels in (expected, free))
    assert distance(made, expected) < 0.2 * distance(made, free)
