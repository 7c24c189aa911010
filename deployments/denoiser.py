"""The stage that turns noise into latents, one step at a time."""

import asyncio
from collections.abc import AsyncIterator

import ray

from deployments.messages import Denoised
from models.catalog import Model
from models.request import VideoRequest
from models.tensors import Conditioning


class Denoiser:
    """Holds the transformers of a tier's models; runs one request's steps at a time.

    Further requests wait at the lock, already here, so that none of the tier's time is lost
    between two of them.
    """

    def __init__(self, models: list[Model], torch_threads: int | None) -> None:
        import torch

        from models.stages import load_denoiser

        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.denoisers = {model.id: load_denoiser(model) for model in models}
        self.turn = asyncio.Lock()

    async def denoise(
        self, request: VideoRequest, conditioning: Conditioning
    ) -> AsyncIterator[Denoised]:
        """Yield after each step; a cancelled call stops before the next one.

        The caller hands over a reference, which Serve resolves here.
        """
        from models.denoise import denoise

        async with self.turn:
            states = denoise(self.denoisers[request.model], request, conditioning)
            while (state := await asyncio.to_thread(next, states, None)) is not None:
                latents = None
                if state.step == state.num_steps:
                    latents = ray.put(state.latents.float().cpu().numpy())
                yield Denoised(state.step, state.num_steps, latents)
