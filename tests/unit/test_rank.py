"""A rank outside of Ray: what it is given, it gives back, and memory is the request's affair."""

import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from bench.ranks import run_ranks
from deployments.rank import Rank
from models.catalog import Model, load_model
from models.conditioning import ZImageConditioning
from models.denoise import denoise
from models.memory import OutOfMemory, within_memory
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder
from models.tensors import ParkedState
from parallel.plan import ParallelPlan
from parallel.traffic import Traffic

ONE = ParallelPlan()
SPARE_BYTES = 96 << 20


def make_rank(model: Model) -> Rank:
    rank = Rank([model], 1)
    rank.join(0, 1, ("", 0), generation=1, timeout_s=10.0)
    return rank


def step(
    rank: Rank, request: VideoRequest, conditioning: ZImageConditioning, state: ParkedState
) -> tuple[Traffic, ParkedState]:
    traffic, after = rank.step(ONE, (0,), 1, [request], conditioning, state)
    assert isinstance(traffic, Traffic)
    assert isinstance(after, ParkedState)
    return traffic, after


def test_steps_with_no_memory_of_the_last_end_in_the_same_bits(
    model: Model, a_request: Callable[..., VideoRequest]
) -> None:
    request = a_request()
    conditioning = load_encoder(model).encode(request, None)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    state = make_rank(model).start(request, conditioning)
    for _ in range(request.num_steps):
        traffic, state = step(make_rank(model), request, conditioning, state)
        assert traffic.calls == {}
    assert np.array_equal(state.latents, last.latents.numpy())


def _run_out_of_memory(_rank: int, folder: Path) -> tuple[str, list[int]]:
    model = load_model(folder)
    rank = make_rank(model)
    text = np.zeros((8, 128), np.float32)
    conditioning = ZImageConditioning(text, None, None, None, 8)
    small = model.resolve({"prompt": "x", "num_steps": 2, "seed": 1, "guidance_scale": 1.0})
    large = small.model_copy(update={"num_frames": 129, "width": 1024, "height": 1024})
    begun = rank.start(small, conditioning)
    rank.step(ONE, (0,), 1, [small], conditioning, begun)  # whatever is taken once, is taken now
    state = rank.start(large, conditioning)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, resource.RLIM_INFINITY))
    try:
        rank.step(ONE, (0,), 1, [large], conditioning, state)
    except OutOfMemory as error:
        told = str(error)
    else:
        told = "nothing"
    _, after = step(rank, small, conditioning, begun)
    return told, list(after.latents.shape)


def test_a_step_that_does_not_fit_fails_alone(checkpoint: Path) -> None:
    ((told, shape),) = run_ranks(1, _run_out_of_memory, checkpoint)
    assert told.startswith("z-image-video: a request does not fit into memory: ")
    assert shape == [1, 8, 4, 8, 8]


def test_what_did_not_fit_is_gone_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the GPU's memory could not be given back."""
    alive: list[bool] = []
    taken: list[weakref.ref[Any]] = []

    def run_out() -> None:
        tensor = torch.zeros(8)
        taken.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(f"no room beside {tensor.shape}")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(taken[0]() is not None))
    with pytest.raises(OutOfMemory) as told:
        within_memory("m", run_out)
    assert alive == [False]
    assert told.value.__context__ is None


def test_other_faults_are_not_taken_for_a_lack_of_memory(
    model: Model, a_request: Callable[..., VideoRequest]
) -> None:
    request = a_request(guidance_scale=1.0)
    narrow = ZImageConditioning(np.zeros((8, 3), np.float32), None, None, None, 8)
    rank = make_rank(model)
    state = rank.start(request, narrow)
    with pytest.raises(RuntimeError, match="must match the size"):
        rank.step(ONE, (0,), 1, [request], narrow, state)


def test_requests_that_share_a_step_differ_only_by_rounding(
    model: Model, a_request: Callable[..., VideoRequest]
) -> None:
    """Their texts, seeds, guidance and steps differ; one of them has no guidance."""
    requests = [
        a_request(prompt="a red circle moving to the right, slowly", seed=1),
        a_request(prompt="x", seed=2, guidance_scale=1.0),
        a_request(prompt="a box", seed=3, guidance_scale=4.0, num_steps=5),
    ]
    encoder, rank = load_encoder(model), make_rank(model)
    conditionings = [encoder.encode(request, None) for request in requests]
    states = [rank.start(*pair) for pair in zip(requests, conditionings, strict=True)]
    _, states[2] = step(rank, requests[2], conditionings[2], states[2])
    _, *together = rank.step(ONE, (0,), 1, requests, *conditionings, *states)
    for request, conditioning, state, shared in zip(
        requests, conditionings, states, together, strict=True
    ):
        _, alone = step(rank, request, conditioning, state)
        assert isinstance(shared, ParkedState)
        assert shared.step == alone.step == state.step + 1
        assert np.abs(shared.latents - alone.latents).max() < 1e-5
    assert len({request_batch for request_batch in map(rank.batch, requests)}) == 1
    assert rank.batch(a_request(width=80)) != rank.batch(requests[0])
