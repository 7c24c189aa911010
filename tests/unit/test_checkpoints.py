"""When the denoiser saves, and what it does about a checkpoint that it can't read."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deployments.checkpoints
from deployments.checkpoints import Checkpoints, CheckpointUnreadable, Unsaved, checkpoint_key
from deployments.config import DenoiserConfig
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.denoise import park
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder
from parallel.plan import ParallelPlan

ARequest = Callable[..., VideoRequest]


@pytest.mark.parametrize("step_s", [0.2, 7.0, 29.0, 40.0])
def test_a_kill_costs_half_a_minute_of_work_or_the_one_step_that_takes_longer(
    step_s: float,
) -> None:
    unsaved, num_saves = Unsaved(), 0
    for _ in range(400):
        unsaved.add(step_s)
        if unsaved.is_due(DenoiserConfig(), step_s):
            unsaved, num_saves = Unsaved(), num_saves + 1
        assert unsaved.seconds + step_s <= max(30.0, step_s)
    assert num_saves <= 400 * step_s / max(30.0 - step_s, step_s)


def test_the_number_of_steps_can_be_the_limit() -> None:
    unsaved = Unsaved()
    due = []
    for _ in range(3):
        unsaved.add(0.1)
        due.append(unsaved.is_due(DenoiserConfig(checkpoint_steps=3), 0.1))
    assert due == [False, False, True]


def test_a_store_that_is_away_for_a_moment_costs_no_step(
    model: Model, a_request: ARequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, request = LocalObjectStore(tmp_path), a_request()
    state = park(load_denoiser(model).start(request, load_encoder(model).encode(request, None)))
    checkpoints = Checkpoints(store, [model])
    checkpoints.save("job", request, state, ParallelPlan())
    path = tmp_path / checkpoint_key("job")
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path)  # reading it is an OSError, as of a file system that is away
    monkeypatch.setattr(deployments.checkpoints, "READ_AGAIN_S", 0.0)
    with pytest.raises(CheckpointUnreadable, match="job job cannot be read"):
        asyncio.run(checkpoints.find("job", request))

    whole = tmp_path / "whole"
    whole.write_bytes(content)

    class ComesBack(logging.Handler):
        """Puts the checkpoint back where it was as soon as one reading of it has failed."""

        def emit(self, record: logging.LogRecord) -> None:
            whole.replace(path)

    comes_back = ComesBack()
    deployments.checkpoints.logger.addHandler(comes_back)
    try:
        found = asyncio.run(checkpoints.find("job", request))
    finally:
        deployments.checkpoints.logger.removeHandler(comes_back)
    assert found is not None
    assert np.array_equal(found.state.latents, state.latents)
