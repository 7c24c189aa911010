"""The denoise loop: a generator, so that whoever drives it sees, counts and may stop each step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.request import VideoRequest
from models.stages import Denoiser
from models.tensors import DenoiseState, ParkedState


def denoise(
    denoiser: Denoiser[Any], request: VideoRequest, conditioning: Conditioning
) -> Iterator[DenoiseState]:
    """Yield the state after each step; the last one holds the finished latents."""
    state = denoiser.start(request, conditioning)
    while state.step < state.num_steps:
        state = denoiser.step(request, conditioning, state)
        yield state


def guide(predicted: Sequence[Tensor], scale: float | Tensor) -> Tensor:
    """negative + scale * (positive - negative) in float32, of [negative, positive] or [positive].

    Classifier-free guidance (arXiv:2207.12598).
    """
    *negative, positive = (prediction.float() for prediction in predicted)
    if not negative:
        return positive
    return negative[0] + scale * (positive - negative[0])


def park(state: DenoiseState) -> ParkedState:
    """Take a state out of torch; nothing is lost or rounded."""
    return ParkedState(
        latents=state.latents.cpu().numpy(),
        step=state.step,
        num_steps=state.num_steps,
        generator=state.generator.numpy(),
        scheduler={name: value.cpu().numpy() for name, value in state.scheduler.items()},
        cache={name: value.cpu().numpy() for name, value in state.cache.items()},
        skipped=state.skipped,
    )


def resume(parked: ParkedState, device: torch.device) -> DenoiseState:
    """The state again, for the next step to be made on that device."""
    return DenoiseState(
        latents=torch.tensor(parked.latents, device=device),
        step=parked.step,
        num_steps=parked.num_steps,
        generator=torch.tensor(parked.generator),
        scheduler={
            name: torch.tensor(value, device=device) for name, value in parked.scheduler.items()
        },
        cache={name: torch.tensor(value, device=device) for name, value in parked.cache.items()},
        skipped=parked.skipped,
    )
