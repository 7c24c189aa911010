"""The stage that turns words and start image into Conditioning."""

import asyncio
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from numpy.typing import NDArray

from deployments.config import EncoderConfig
from deployments.messages import Encoded
from deployments.worker_log import log_choices
from media.decode import read_all_frames, read_shape
from media.edges import find_edges
from media.object_store import ObjectStore
from models.catalog import Model
from models.embeddings import EmbeddingCache
from models.masks import read_masks
from models.memory import within_memory
from models.request import VideoRequest
from models.stages import ControlEncoder
from models.start_image import decode_png

PNG = b"\x89PNG"


class TextEncoder:
    """Holds the text encoder, and the VAE's encoder for start images, of every model."""

    def __init__(
        self,
        models: list[Model],
        store: ObjectStore,
        config: EncoderConfig,
        torch_threads: int | None,
    ) -> None:
        import torch

        from models.stages import load_encoder

        log_choices()
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.models = {model.id: model for model in models}
        self.encoders = {model.id: load_encoder(model) for model in models}
        self.store = store
        self.cache = EmbeddingCache(config.cache_bytes)

    async def encode_text(self, request: VideoRequest) -> Encoded:
        """A reference to the request's Conditioning."""
        return await asyncio.to_thread(self._encode, request)

    def _encode(self, request: VideoRequest) -> Encoded:
        image = None if request.start_image is None else self.store.get(request.start_image)
        frames = None
        if request.source_video is not None:
            frames = self._read_frames(request, self.store.get(request.source_video))
        embeddings = self.cache.open(request.model)
        encoder: Any = self.encoders[request.model]
        encode = functools.partial(encoder.encode, request, image, frames, embeddings)
        if request.region_masks is not None:
            masks = read_masks(self.store.get(request.region_masks))
            encode = functools.partial(encode, region_masks=masks)
        conditioning = within_memory(request.model, encode)
        if request.mask is not None:
            mask = encoder.encode_mask(request, self._read_pictures(request, request.mask))
            conditioning = dataclasses.replace(conditioning, mask=mask)
        if request.control is not None:
            assert request.control_reference is not None
            pictures = self._read_pictures(request, request.control_reference)
            if request.control.preprocess:
                pictures = find_edges(pictures)
            leader = cast("ControlEncoder[Any]", encoder)
            control = within_memory(
                request.model, lambda: leader.encode_control(request, pictures, embeddings)
            )
            conditioning = dataclasses.replace(conditioning, control=control)
        return Encoded(
            ray.put(conditioning),
            conditioning.num_tokens,
            self.models[request.model].max_text_tokens(request),
            embeddings.num_made > 0,
        )

    def _read_pictures(self, request: VideoRequest, key: str) -> NDArray[np.uint8]:
        """uint8 [F, H, W, 3] of a video, frame by frame, or of an image, which is one."""
        content = self.store.get(key)
        if content.startswith(PNG):
            return decode_png(content)[None]
        return self._read_frames(request, content, at_own_rate=True)

    def _read_frames(
        self, request: VideoRequest, content: bytes, *, at_own_rate: bool = False
    ) -> NDArray[np.uint8]:
        """At the rate of the request, or each frame of the file as it is."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video"
            path.write_bytes(content)
            return read_all_frames(
                path,
                width=request.width,
                height=request.height,
                fps=read_shape(path).fps if at_own_rate else request.fps,
                max_frames=request.num_frames,
            )
