"""The denoise loop: a generator, so that whoever drives it sees, counts and may stop each step."""

from collections.abc import Iterator

from models.request import VideoRequest
from models.stages import Denoiser
from models.tensors import Conditioning, DenoiseState


def denoise(
    denoiser: Denoiser, request: VideoRequest, conditioning: Conditioning
) -> Iterator[DenoiseState]:
    """Yield the state after each step; the last one holds the finished latents."""
    state = denoiser.start(request, conditioning)
    while state.step < state.num_steps:
        state = denoiser.step(request, conditioning, state)
        yield state
