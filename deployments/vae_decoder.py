"""The stage that turns latents into frames, streamed in temporal order."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from deployments.worker_log import log_choices
from models.catalog import Model
from models.memory import within_memory
from models.request import VideoRequest
from models.stages import ChunkDecoder, TileDecoder
from models.tensors import Frames
from models.tiles import Box, chunk_of


class VaeDecoder:
    """Holds the VAE decoders of a tier's models; decodes one request, tile or run of frames at a
    time.
    """

    def __init__(self, models: list[Model], torch_threads: int | None) -> None:
        import torch

        from models.stages import load_decoder

        log_choices()
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.models = {model.id: model for model in models}
        self.decoders = {model.id: load_decoder(model) for model in models}
        self.turn = asyncio.Lock()

    async def decode(
        self, request: VideoRequest, latents: NDArray[np.float32]
    ) -> AsyncIterator[Frames]:
        """Yield runs of frames as soon as they exist.

        The caller hands over a reference to the latents, which Serve resolves here.
        """
        async with self.turn:
            chunks = self.decoders[request.model].decode(request, latents)
            next_chunk = functools.partial(next, chunks, None)
            while True:
                frames = await asyncio.to_thread(within_memory, request.model, next_chunk)
                if frames is None:
                    return
                yield frames

    async def decode_tile(
        self, model: str, latents: NDArray[np.float32], box: Box
    ) -> NDArray[np.float32]:
        """One tile of a request's frames, [C, F, h, w]; its others may be made elsewhere."""
        decoder = cast("TileDecoder", self.decoders[model])
        return await self._make(model, functools.partial(decoder.decode_tile, latents, box))

    async def decode_chunk(
        self, model: str, latents: NDArray[np.float32], start: int
    ) -> NDArray[np.float32]:
        """One run of a request's frames, [3, F, H, W]; its others may be made elsewhere."""
        decoder = cast("ChunkDecoder", self.decoders[model])
        chunk = chunk_of(self.models[model], latents, start)
        return await self._make(model, functools.partial(decoder.decode_chunk, chunk))

    async def _make(
        self, model: str, decode: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        async with self.turn:
            return await asyncio.to_thread(within_memory, model, decode)
