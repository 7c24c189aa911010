"""Gets a video's frames out of a tier's pool of decoders, whole, in runs or in tiles."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.handle import DeploymentHandle

from autoscaling.room import TierRoom
from deployments.config import DecoderConfig
from deployments.messages import Denoised
from models.catalog import Model
from models.request import VideoRequest
from models.tensors import Frames
from models.tiles import Pixels, chunk_starts, tile_grid, to_frames

logger = logging.getLogger("ray.serve")

FRAMES_AT_ONCE = 8


class DecoderPool:
    """The decoders of one tier."""

    def __init__(
        self,
        decoder: DeploymentHandle[Any],
        models: list[Model],
        config: DecoderConfig,
        rooms: Mapping[str, TierRoom],
    ) -> None:
        """rooms: by model, where the memory of the tier's GPUs is told."""
        self.whole: Any = decoder.options(method_name="decode", stream=True)
        self.tile: Any = decoder.options(method_name="decode_tile")
        self.chunk: Any = decoder.options(method_name="decode_chunk")
        self.models = {model.id: model for model in models}
        self.config = config
        self.rooms = rooms

    async def decode(self, request: VideoRequest, denoised: Denoised) -> AsyncIterator[Frames]:
        """Runs of frames, in temporal order."""
        model = self.models[request.model]
        if self._tiles(model, request):
            made = self._decode_tiles(model, request, denoised)
        elif self.config.chunks_at_once > 1 and model.spec.in_chunks:
            made = self._decode_chunks(model, request, denoised)
        else:
            made = self.whole.remote(request, denoised.latents)
        async for frames in made:
            yield frames

    def _tiles(self, model: Model, request: VideoRequest) -> bool:
        if (room := self.rooms.get(model.id)) is not None:
            return room.tiles(model, request)
        above = self.config.tile_above_area
        is_large = above is not None and request.width * request.height > above
        return is_large and model.spec.in_tiles

    async def _decode_tiles(
        self, model: Model, request: VideoRequest, denoised: Denoised
    ) -> AsyncIterator[Frames]:
        grid = tile_grid(model, request)
        tiles = await asyncio.gather(
            *[self._make(self.tile, model.id, denoised.latents, box) for box in grid.boxes]
        )
        for first in range(0, request.num_frames, FRAMES_AT_ONCE):
            last = min(first + FRAMES_AT_ONCE, request.num_frames)
            joined = await asyncio.to_thread(grid.join, [tile[:, first:last] for tile in tiles])
            yield to_frames(joined, request)

    async def _decode_chunks(
        self, model: Model, request: VideoRequest, denoised: Denoised
    ) -> AsyncIterator[Frames]:
        """Each as soon as those before it are there; few are asked for ahead."""
        remaining = request.num_frames
        starts = deque(chunk_starts(model, request))
        asked: deque[asyncio.Task[Pixels]] = deque()
        try:
            while starts or asked:
                while starts and len(asked) < self.config.chunks_at_once:
                    made = self._make(self.chunk, model.id, denoised.latents, starts.popleft())
                    asked.append(asyncio.create_task(made))
                pixels = await asked.popleft()
                yield to_frames(pixels[:, :remaining], request)
                remaining -= pixels.shape[1]
        finally:
            for task in asked:
                task.cancel()

    async def _make(self, handle: Any, *asked: Any) -> Pixels:
        """A part that is lost with its decoder, or the node where it lay, is made again alone."""
        left = self.config.tile_attempts
        while True:
            try:
                return np.asarray(await handle.remote(*asked))
            except (RayActorError, ObjectLostError) as error:
                left -= 1
                if not left:
                    raise
                logger.warning("a part of the frames is lost, and made again: %s", error)
