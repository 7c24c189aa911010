"""The images and videos that requests come with: uploaded, by address, or made here before."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from deployments.config import LimitsConfig
from deployments.database import single_reader
from deployments.errors import VideoNotReady
from deployments.picture_fields import WEB_URL
from deployments.source_video import SourceVideo, every_frame, is_video, read_source
from deployments.url_guard import UrlGuardConfig, UrlRefused, fetch
from jobs.job import Job
from jobs.store import get_job
from media.object_store import LocalObjectStore
from media.renditions import Rendition, rendition_key
from models.catalog import Model
from models.masks import Mask, as_mask, write_masks
from models.request import Control, InvalidRequest, VideoRequest
from models.start_image import CropBox, StartImage, decode_png, prepare_start_image

DECODED_AT_ONCE = 2
FIRST_FRAME = (0,)
T = TypeVar("T")


class Sources:
    """Reads them within the limits; InvalidRequest names the field that holds what can't be."""

    def __init__(
        self,
        engine: Engine,
        store: LocalObjectStore,
        limits: LimitsConfig,
        image_urls: UrlGuardConfig,
    ) -> None:
        self.engine = engine
        self.store = store
        self.limits = limits
        self.image_urls = image_urls
        # Decoding takes a core and some memory; what more of it is asked for waits.
        self.decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    async def image(
        self,
        given: bytes | str,
        size: tuple[int, int],
        crop: CropBox | None = None,
        param: str = "input_reference",
    ) -> StartImage:
        """Of a file or an address, fitted to the size (width, height)."""
        content = given if isinstance(given, bytes) else await self._fetch(given, param)
        return await self._decode(
            lambda: prepare_start_image(
                content, size=size, crop=crop, limits=self.limits.image, param=param
            )
        )

    async def video(
        self, given: bytes | str | None, account_id: str, param: str = "video"
    ) -> SourceVideo:
        """Of a file, or of the id of a video of the account's."""
        if given is None:
            raise InvalidRequest(param, f"{param} is required: a file, or the id of a video")
        if isinstance(given, str):
            job = await run_in_threadpool(self.find_finished, given, account_id)
            given = await run_in_threadpool(self.store.get, rendition_key(job.id, Rendition.VIDEO))
        content = given
        return await self._decode(lambda: read_source(content, self.limits, param))

    async def control(
        self, given: bytes | str, request: VideoRequest, model: Model, account_id: str
    ) -> tuple[bytes, Control]:
        """A PNG or a video with a picture for each frame that is led, and which those are."""
        control = request.control
        assert control is not None
        param = "control_reference"
        if isinstance(given, str) and WEB_URL.fullmatch(given):
            given = await self._fetch(given, param)
        if isinstance(given, bytes) and not await run_in_threadpool(is_video, given):
            image = await self.image(given, (request.width, request.height), param=param)
            if model.control_net(control.type).is_sparse and control.frames is None:
                control = control.model_copy(update={"frames": FIRST_FRAME})
            if control.frames is not None and len(control.frames) > 1:
                message = f"{param} is one image, and control names {len(control.frames)} frames"
                raise InvalidRequest(param, message)
            return image.png, control
        source = await self.video(given, account_id, param)
        wanted = request.num_frames if control.frames is None else len(control.frames)
        if source.num_frames != wanted:
            message = f"{param} has {source.num_frames} frames, not {wanted}, one for each led"
            raise InvalidRequest(param, message)
        return source.content, control

    async def masks(
        self, given: Sequence[bytes | str], request: VideoRequest, account_id: str, param: str
    ) -> bytes:
        """Of the video's size, an image for all frames or a video of as many; white is inside.

        As `models.masks` keeps them.
        """
        read = [await self._mask(one, request, account_id, param) for one in given]
        return await self._decode(lambda: write_masks(read))

    async def _mask(
        self, given: bytes | str, request: VideoRequest, account_id: str, param: str
    ) -> Mask:
        read = await self.mask(given, request, account_id, param)
        if isinstance(read, SourceVideo):
            return await self._decode(
                lambda: np.concatenate([as_mask(chunk) for chunk in every_frame(read)])
            )
        return as_mask(decode_png(read)[None])

    async def mask(
        self, given: bytes | str, request: VideoRequest, account_id: str, param: str = "mask"
    ) -> SourceVideo | bytes:
        """A video or a PNG of just the video's size, as checked."""
        wanted = request.width, request.height
        if isinstance(given, str) and WEB_URL.fullmatch(given):
            given = await self._fetch(given, param)
        if isinstance(given, bytes) and not await run_in_threadpool(is_video, given):
            image = await self.image(given, wanted, param=param)
            _check_size(param, image.size, wanted)
            return image.png
        source = await self.video(given, account_id, param)
        _check_size(param, (source.shape.width, source.shape.height), wanted)
        if source.num_frames != request.num_frames:
            message = f"{param}: a mask has {source.num_frames} frames, not {request.num_frames}"
            raise InvalidRequest(param, message)
        return source

    def find_finished(self, video_id: str, account_id: str) -> Job:
        """A video of the account's that is made; JobNotFound, VideoNotReady."""
        with single_reader(self.engine).begin() as connection:
            job = get_job(connection, video_id, account_id)
        if job.video_key is None:
            raise VideoNotReady(job.id, job.state)
        return job

    async def _fetch(self, address: str, param: str) -> bytes:
        try:
            return await fetch(address, self.image_urls, self.limits.max_body_bytes)
        except UrlRefused as error:
            raise InvalidRequest(param, f"{param}: {error}") from error

    async def _decode(self, read: Callable[[], T]) -> T:
        async with self.decoding:
            return await run_in_threadpool(read)


def _check_size(param: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    if size != wanted:
        shapes = "{}x{}, the video {}x{}".format(*size, *wanted)
        raise InvalidRequest(param, f"{param}: a mask is {shapes}")
