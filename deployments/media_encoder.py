"""The stage that pulls frames from the decoder, writes the MP4 and publishes it."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle

from autoscaling.room import TierRoom
from autoscaling.tiers import GpuTier
from deployments.config import TierConfig
from deployments.decoding import DecoderPool
from deployments.messages import Denoised, Encoding, Published
from media.decode import read_frames
from media.encode import Mp4Encoder
from media.object_store import ObjectStore
from media.renditions import Rendition, rendition_key
from media.stills import Stills
from models.catalog import Model
from models.request import VideoRequest
from models.tensors import Frames

SCRATCH_S = 3600.0


class MediaEncoder:
    """Encodes while chunks of frames arrive: they go from decoder to encoder, past the pipeline."""

    def __init__(
        self,
        store: ObjectStore,
        scratch: Path,
        decoders: dict[str, DeploymentHandle[Any]],
        models: list[Model],
        tiers: list[TierConfig],
        rooms: Mapping[GpuTier, Mapping[str, TierRoom]],
    ) -> None:
        self.store = store
        self.scratch = scratch
        self.scratch.mkdir(parents=True, exist_ok=True)
        for left in self.scratch.iterdir():  # by a replica that was killed
            with contextlib.suppress(FileNotFoundError):  # another replica was quicker
                if time.time() - left.stat().st_mtime > SCRATCH_S:
                    shutil.rmtree(left, ignore_errors=True)
        self.decoders = {
            tier.tier: DecoderPool(decoders[tier.tier], models, tier.decoder, rooms[tier.tier])
            for tier in tiers
        }

    async def encode_media(
        self, job_id: str, tier: str, request: VideoRequest, denoised: Denoised
    ) -> AsyncIterator[Encoding | Published]:
        """Yield the frames written so far, and last where the finished video is.

        Only the reference in `denoised` passes through here; the decoder reads the latents.
        """
        key = rendition_key(job_id, Rendition.VIDEO)
        stills = Stills(request.total_frames)
        decode_s = media_s = 0.0
        frame = 0
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            path = Path(folder) / "video.mp4"
            size = {"width": request.width, "height": request.height}
            with Mp4Encoder(path, **size, fps=request.fps, threads=1) as encoder:
                if request.continues is not None:
                    source = Path(folder) / "source.mp4"
                    source.write_bytes(self.store.get(request.continues))
                    await asyncio.to_thread(_copy_frames, source, request, encoder, stills)
                chunks = self.decoders[GpuTier(tier)].decode(request, denoised)
                waiting_s = time.monotonic()
                async for frames in chunks:
                    arrived_s = time.monotonic()
                    decode_s += arrived_s - waiting_s
                    arrived = len(frames.pixels)
                    if frame == 0 and request.continues is not None:
                        frames = Frames(frames.pixels[1:], frames.fps)  # it is there already
                    await asyncio.to_thread(encoder.write, frames)
                    await asyncio.to_thread(stills.add, frames.pixels)
                    frame += arrived
                    yield Encoding(frame, request.num_frames)
                    waiting_s = time.monotonic()
                    media_s += waiting_s - arrived_s
                started_s = time.monotonic()
                decode_s += started_s - waiting_s
                await asyncio.to_thread(encoder.finish)
            await asyncio.to_thread(self._put_stills, job_id, stills)
            stored = await asyncio.to_thread(self.store.put, key, path)
            media_s += time.monotonic() - started_s
        yield Published(key, stored.size_bytes, decode_s, media_s)

    def _put_stills(self, job_id: str, stills: Stills) -> None:
        """Before the video: where that is, its pictures are."""
        self.store.put(rendition_key(job_id, Rendition.THUMBNAIL), stills.thumbnail())
        self.store.put(rendition_key(job_id, Rendition.SPRITESHEET), stills.spritesheet())


def _copy_frames(source: Path, request: VideoRequest, encoder: Mp4Encoder, stills: Stills) -> None:
    """Write the frames that the video goes on from."""
    for pixels in read_frames(
        source,
        width=request.width,
        height=request.height,
        fps=request.fps,
        max_frames=request.continued_frames,
    ):
        encoder.write(Frames(pixels, request.fps))
        stills.add(pixels)
