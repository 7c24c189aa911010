"""The stage that turns words and start image into Conditioning."""

import asyncio
import functools
import tempfile
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from deployments.config import EncoderConfig
from deployments.messages import Encoded
from media.decode import read_all_frames
from media.object_store import ObjectStore
from models.catalog import Model
from models.embeddings import EmbeddingCache
from models.memory import within_memory
from models.request import VideoRequest


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
        encode = functools.partial(
            self.encoders[request.model].encode, request, image, frames, embeddings
        )
        conditioning = within_memory(request.model, encode)
        return Encoded(
            ray.put(conditioning),
            conditioning.num_tokens,
            self.models[request.model].manifest.max_text_tokens,
            embeddings.num_made > 0,
        )

    def _read_frames(self, request: VideoRequest, content: bytes) -> NDArray[np.uint8]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video"
            path.write_bytes(content)
            return read_all_frames(
                path,
                width=request.width,
                height=request.height,
                fps=request.fps,
                max_frames=request.num_frames,
            )
