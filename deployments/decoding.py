"""Gets a video's frames out of a tier's pool of decoders, whole or in tiles."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.config import DecoderConfig
from deployments.messages import Denoised
from models.catalog import Model
from models.request import VideoRequest
from models.tensors import Frames
from models.tiles import Box, Pixels, tile_grid, to_frames

logger = logging.getLogger("ray.serve")

FRAMES_AT_ONCE = 8


class DecoderPool:
    """The decoders of one tier."""

    def __init__(
        self, decoder: DeploymentHandle[Any], models: list[Model], config: DecoderConfig
    ) -> None:
        self.whole: Any = decoder.options(method_name="decode", stream=True)
        self.tile: Any = decoder.options(method_name="decode_tile")
        self.models = {model.id: model for model in models}
        self.config = config

    async def decode(self, request: VideoRequest, denoised: Denoised) -> AsyncIterator[Frames]:
        """Runs of frames, in temporal order."""
        above = self.config.tile_above_area
        model = self.models[request.model]
        if above is None or request.width * request.height <= above or not model.spec.in_tiles:
            async for frames in self.whole.remote(request, denoised.latents):
                yield frames
            return
        grid = tile_grid(model, request)
        tiles = await asyncio.gather(
            *[self._decode_tile(request, denoised, box) for box in grid.boxes]
        )
        for first in range(0, request.num_frames, FRAMES_AT_ONCE):
            last = min(first + FRAMES_AT_ONCE, request.num_frames)
            joined = await asyncio.to_thread(grid.join, [tile[:, first:last] for tile in tiles])
            yield to_frames(joined, request)

    async def _decode_tile(self, request: VideoRequest, denoised: Denoised, box: Box) -> Pixels:
        """A tile that is lost with its decoder, or the node where it lay, is made again alone."""
        left = self.config.tile_attempts
        while True:
            try:
                return np.asarray(await self.tile.remote(request.model, denoised.latents, box))
            except (RayActorError, ObjectLostError) as error:
                left -= 1
                if not left:
                    raise
                logger.warning("a tile is lost, and made again: %s", error)
