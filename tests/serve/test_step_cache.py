"""Passes that a request skips over HTTP: shown, not charged, and the same on two ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.clusters import Cluster
from models.catalog import load_model
from models.denoise import denoise
from models.stages import load_decoder, load_denoiser, load_encoder
from tests.serve.conftest import read_mp4
from tests.serve.test_control import through_mp4
from tests.serve.test_families import distance, finish

pytestmark = pytest.mark.serve

SIDE = 64
FIELDS = {"prompt": "a red circle", "num_frames": 5, "num_steps": 10, "seed": 5}
CACHE = {"by": "prediction", "threshold": 0.9, "warm_up": 3}
SKIPPING = {"step_cache": CACHE, "cfg_skip_ratio": 0.3}


def test_skipped_passes_are_not_charged_and_two_ranks_skip_the_same(
    cluster: Cluster, config_path: Path, tmp_path: Path
) -> None:
    client = cluster.client
    fields = {**FIELDS, "model": "pair", "size": f"{SIDE}x{SIDE}", "guidance_scale": 2.0}
    made = {}
    for name, skipping in (("whole", {}), ("skipping", SKIPPING)):
        video = finish(client, client.create({**fields, **skipping})["id"])
        assert video["status"] == "completed", video["error"]
        client.download(video["id"], tmp_path / f"{name}.mp4")
        made[name] = video
    assert made["whole"]["passes"] == {"planned": 20, "skipped": 0}
    assert made["whole"]["charged"] == made["whole"]["quoted"]

    model = load_model(config_path.parent / "random", "pair")
    asked = {**FIELDS, "width": SIDE, "height": SIDE, "guidance_scale": 2.0, **SKIPPING}
    request = model.resolve(asked)
    conditioning = load_encoder(model).encode(request, None)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    chunks = load_decoder(model).decode(request, last.latents.numpy())
    expected = np.concatenate([frames.pixels for frames in chunks])

    video = made["skipping"]
    assert 3 < last.skipped == video["passes"]["skipped"]
    assert video["quoted"] == made["whole"]["quoted"] == 10
    share = 10 + 90 * (20 - last.skipped) / 20
    assert video["charged"] == int(video["quoted"] * share / 100 + 0.5)
    assert video["step_cache"] == CACHE
    assert video["skipping_measured"] is None
    told = [event.data["skipped_passes"] for event in client.follow(video["id"])]
    assert told[:-1] == sorted(told[:-1])
    assert told[-2] == last.skipped
    found = read_mp4(tmp_path / "skipping.mp4")
    whole = read_mp4(tmp_path / "whole.mp4")
    assert distance(found, through_mp4(tmp_path / "x.mp4", expected)) < 0.2 * distance(found, whole)


def test_what_was_measured_of_the_shipped_model_is_told(cluster: Cluster) -> None:
    way: dict[str, Any] = {"step_cache": {"threshold": 0.1}}
    video = finish(cluster.client, cluster.client.create({"prompt": "a red circle", **way})["id"])
    assert video["skipping_measured"]["psnr_db"] > 40
    assert video["passes"]["skipped"] > 0
