"""Z-Image steps as diffusers' schedulers do, whatever the way from one noise level to the next."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

from models.catalog import Model
from models.denoise import denoise, park, resume
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder

NUM_STEPS = 4
ARequest = Callable[..., VideoRequest]


def levels(num_steps: int, shift: float) -> torch.Tensor:
    """shift * t / (1 + (shift - 1) * t), of 1 down to 1/n, and at last 0."""
    times = torch.linspace(1, 1 / num_steps, num_steps)
    return torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1)])


def straight_loop(
    model: Model, request: VideoRequest, kind: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The latents by diffusers' scheduler, and the times at which the model was asked."""
    denoiser: Any = load_denoiser(model)
    conditioning: Any = load_encoder(model).encode(request, None)
    sigmas = levels(request.num_steps, float(denoiser.schedules.euler.config.shift))
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = denoiser.start(request, conditioning).latents
    torch.randn(latents.shape, generator=generator)
    if kind == "heun":
        schedule: Any = FlowMatchHeunDiscreteScheduler()
        schedule.set_timesteps(request.num_steps)
        twice = sigmas[1:-1].repeat_interleave(2)
        schedule.sigmas = torch.cat([sigmas[:1], twice, sigmas[-1:]])
        schedule.timesteps = 1000 * schedule.sigmas[:-1]
        schedule.set_begin_index(0)
    else:
        schedule = FlowMatchLCMScheduler(shift=1.0)
        schedule.set_timesteps(sigmas=sigmas[:-1].tolist())
    for time in schedule.timesteps:
        texts = [torch.tensor(conditioning.positive)]
        with torch.no_grad():
            out = denoiser.transformer(
                [latents[0]], ((1000 - time) / 1000)[None], texts, patch_size=2, f_patch_size=1
            ).sample[0]
        latents = schedule.step(-out[None], time, latents, generator=generator).prev_sample
    return latents, list(schedule.timesteps)


@pytest.mark.parametrize(("kind", "num_passes"), [("heun", 2 * NUM_STEPS - 1), ("lcm", NUM_STEPS)])
def test_a_scheduler_is_diffusers_own(
    model: Model, a_request: ARequest, kind: str, num_passes: int
) -> None:
    request = a_request(num_frames=5, num_steps=NUM_STEPS, guidance_scale=1.0, scheduler=kind)
    expected, times = straight_loop(model, request, kind)
    assert len(times) == num_passes
    denoiser = load_denoiser(model)
    *_, last = denoise(denoiser, request, load_encoder(model).encode(request, None))
    assert (last.latents - expected).abs().max() < 1e-5
    *_, euler = denoise(
        denoiser,
        request.model_copy(update={"scheduler": None}),
        load_encoder(model).encode(request, None),
    )
    assert (last.latents - euler.latents).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"num_steps": 4, "scheduler": "heun"},
        {"num_steps": 4, "scheduler": "heun", "guidance_scale": 2.0},
        {"num_steps": 5, "scheduler": "heun", "denoising_end": 0.6},
        {"num_steps": 4, "scheduler": "lcm"},
    ],
)
def test_as_many_passes_are_planned_as_are_made(
    model: Model, a_request: ARequest, fields: dict[str, Any]
) -> None:
    request = a_request(num_frames=5, **fields)
    denoiser: Any = load_denoiser(model)
    rows: list[int] = []
    denoiser.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    list(denoise(denoiser, request, load_encoder(model).encode(request, None)))
    assert sum(rows) == request.planned_passes


@pytest.mark.parametrize("kind", ["heun", "lcm"])
def test_a_denoise_goes_on_from_any_step_in_the_same_bits(
    model: Model, a_request: ARequest, kind: str
) -> None:
    request = a_request(num_frames=5, num_steps=NUM_STEPS, guidance_scale=2.0, scheduler=kind)
    conditioning = load_encoder(model).encode(request, None)
    denoiser = load_denoiser(model)
    states = list(denoise(denoiser, request, conditioning))
    for state in states[:-1]:
        again = resume(park(state), torch.device("cpu"))
        while again.step < again.num_steps:
            again = denoiser.step(request, conditioning, again)
        assert torch.equal(again.latents, states[-1].latents)


def test_heuns_method_holds_the_start_frame(model: Model, a_request: ARequest) -> None:
    request = a_request(num_frames=5, num_steps=3, scheduler="heun")
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None)
    start = np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)

    held = replace(conditioning, start_latents=start)
    *_, last = denoise(load_denoiser(model), request, held)
    assert np.array_equal(last.latents[0, :, :1].numpy(), start)


def test_what_steps_by_heuns_method_shares_no_step(model: Model, a_request: ARequest) -> None:
    denoiser = load_denoiser(model)
    assert denoiser.batch(a_request(scheduler="heun")) is None
    assert denoiser.batch(a_request(scheduler="lcm")) == denoiser.batch(a_request())
