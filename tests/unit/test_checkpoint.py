"""A checkpoint holds all that a resume needs, and is used only where it fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.catalog import MeasuredSkipping, Model
from models.checkpoint import (
    Checkpoint,
    CheckpointUnusable,
    check_agrees,
    model_revision,
    pack,
    request_digest,
    unpack,
)
from models.denoise import denoise, park, resume
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder
from models.tensors import DenoiseState
from parallel.plan import ParallelPlan

ARequest = Callable[..., VideoRequest]


@pytest.fixture
def saved(model: Model, a_request: ARequest) -> Checkpoint:
    request = a_request()
    conditioning = load_encoder(model).encode(request, None)
    state = load_denoiser(model).start(request, conditioning)
    return Checkpoint(
        park(state), ParallelPlan(guidance=2), request_digest(request), model_revision(model)
    )


def test_a_resumed_denoise_ends_in_the_same_bits(model: Model, a_request: ARequest) -> None:
    request = a_request(num_steps=5)
    conditioning = load_encoder(model).encode(request, None)
    denoiser = load_denoiser(model)
    states = list(denoise(denoiser, request, conditioning))
    made_at = Checkpoint(
        park(states[1]), ParallelPlan(), request_digest(request), model_revision(model)
    )
    read = unpack(pack(made_at))
    state = resume(read.state, torch.device("cpu"))
    assert state.step == 2
    other = load_denoiser(model)
    while state.step < state.num_steps:
        state = other.step(request, conditioning, state)
    assert torch.equal(state.latents, states[-1].latents)


def test_nothing_of_a_state_is_lost(saved: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(3)
    state = DenoiseState(
        latents=torch.randn(1, 2, 3, 4, 5, generator=generator),
        step=4,
        num_steps=9,
        generator=generator.get_state(),
        scheduler={"derivative": torch.randn(1, 2, 3, 4, 5, generator=generator)},
    )
    read = unpack(pack(replace(saved, state=park(state))))
    assert (read.plan, read.request) == (saved.plan, saved.request)
    again = resume(read.state, torch.device("cpu"))
    assert (again.step, again.num_steps) == (4, 9)
    assert torch.equal(again.latents, state.latents)
    assert torch.equal(again.scheduler["derivative"], state.scheduler["derivative"])
    expected = torch.Generator()
    expected.set_state(state.generator)
    resumed = torch.Generator()
    resumed.set_state(again.generator)
    assert torch.equal(torch.randn(8, generator=resumed), torch.randn(8, generator=expected))


def test_it_is_small(saved: Checkpoint) -> None:
    state = saved.state
    assert len(pack(saved)) < state.latents.nbytes + state.generator.nbytes + 1024


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\xff" * 64 + content[64:],
        lambda content: content.replace(b"mutoscope-denoise-1", b"mutoscope-denoise-0"),
        lambda content: content.replace(b"checkpoint", b"chockpoint"),
    ],
)
def test_a_damaged_one_is_not_used(saved: Checkpoint, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CheckpointUnusable):
        unpack(damage(pack(saved)))


def test_another_safetensors_file_is_not_used() -> None:
    from safetensors.numpy import save

    with pytest.raises(CheckpointUnusable):
        unpack(save({"latents": np.zeros(3, np.float32)}))


@pytest.mark.parametrize("change", [{"seed": 8}, {"prompt": "a blue box"}, {"num_steps": 4}])
def test_one_of_another_request_is_not_used(
    saved: Checkpoint, model: Model, a_request: ARequest, change: dict[str, Any]
) -> None:
    check_agrees(saved, a_request(), model)
    with pytest.raises(CheckpointUnusable, match="another request"):
        check_agrees(saved, a_request(**change), model)


def test_one_of_other_weights_is_not_used(
    saved: Checkpoint, model: Model, a_request: ARequest
) -> None:
    changed = model.manifest.sha256 | {"transformer/new.safetensors": "0" * 64}
    manifest = model.manifest.model_copy(update={"sha256": changed})
    with pytest.raises(CheckpointUnusable, match="weights"):
        check_agrees(saved, a_request(), replace(model, manifest=manifest))


def test_what_is_measured_of_a_model_makes_no_checkpoint_unusable(model: Model) -> None:
    measured = MeasuredSkipping(
        num_steps=1,
        guidance_scale=1.0,
        f_patch_size=1,
        num_videos=1,
        psnr_db=1.0,
        min_psnr_db=1.0,
        passes_made=1.0,
    )
    manifest = model.manifest.model_copy(update={"skipping": (measured,)})
    assert model_revision(replace(model, manifest=manifest)) == model_revision(model)
    other = model.manifest.model_copy(update={"sha256": {"x": "y"}})
    assert model_revision(replace(model, manifest=other)) != model_revision(model)


def test_a_field_that_a_later_version_adds_makes_no_checkpoint_unusable(
    a_request: ARequest,
) -> None:
    class LaterRequest(VideoRequest):
        later: str | None = None

    request = a_request()
    later = LaterRequest.model_validate(request.model_dump())
    assert request_digest(later) == request_digest(request)
    asked = LaterRequest.model_validate({**request.model_dump(), "later": "x"})
    assert request_digest(asked) != request_digest(request)
