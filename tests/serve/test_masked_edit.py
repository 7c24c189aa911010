"""A part of a video is changed over HTTP: the rest stays, and steps that are not made cost less."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bench.clusters import Cluster
from media.encode import Mp4Encoder
from models.tensors import Frames
from tests.serve.conftest import read_mp4
from tests.serve.test_families import finish

pytestmark = pytest.mark.serve

SIDE, NUM_FRAMES = 64, 5
FORM = {"prompt": "a blue square moving left", "num_steps": "10", "seed": "3"}


def test_what_a_mask_leaves_black_stays_and_half_the_steps_are_charged(
    cluster: Cluster, tmp_path: Path
) -> None:
    client = cluster.client
    pixels = np.full((NUM_FRAMES, SIDE, SIDE, 3), 40, np.uint8)
    pixels[:, 20:44, 20:44] = (200, 40, 40)
    with Mp4Encoder(tmp_path / "source.mp4", width=SIDE, height=SIDE, fps=8, threads=1) as encoder:
        encoder.write(Frames(pixels, 8))
        encoder.finish()
    source = (tmp_path / "source.mp4").read_bytes()
    right_half = np.zeros((SIDE, SIDE), bool)
    right_half[:, SIDE // 2 :] = True

    def edit(
        name: str, mask: NDArray[np.bool_], **fields: str
    ) -> tuple[dict[str, Any], NDArray[np.int64]]:
        content = io.BytesIO()
        Image.fromarray(mask).save(content, "PNG")
        answer = httpx.post(
            f"{cluster.server.url}/v1/videos/edits",
            headers={"authorization": f"Bearer {cluster.server.api_key}"},
            data={**FORM, **fields},
            files={"video": ("source.mp4", source), "mask": ("mask.png", content.getvalue())},
        )
        assert answer.status_code == 200, answer.text
        video = finish(client, answer.json()["id"])
        assert video["status"] == "completed", video["error"]
        client.download(video["id"], tmp_path / f"{name}.mp4")
        return video, read_mp4(tmp_path / f"{name}.mp4").astype(int)

    whole, made = edit("whole", right_half)
    _, as_it_is = edit("black", np.zeros_like(right_half))  # the source through the VAE
    change = np.abs(made - as_it_is).mean(axis=(0, 1, 3))
    # the VAE sees two latents' breadth beyond the mask's edge
    assert change[: SIDE // 2 - 16].mean() < 0.2 * change[SIDE // 2 :].mean()
    assert whole["charged"] == whole["quoted"]
    half, _ = edit("half", right_half, denoising_end="0.5")
    assert half["quoted"] == whole["quoted"] == 10
    # text 2, half of 90, decode 6 and media 2 of 100 parts
    assert (half["charged"], half["refunded"]) == (6, 4)
    assert list((cluster.home / "storage").glob("inputs/*")) == []
