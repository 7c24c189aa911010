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
        found = await self._open(given, request, account_id, param)
        if isinstance(found, StartImage):
            if model.control_net(control.type).is_sparse and control.frames is None:
                control = control.model_copy(update={"frames": FIRST_FRAME})
            if control.frames is not None and len(control.frames) > 1:
                message = f"{param} is one image, and control names {len(control.frames)} frames"
                raise InvalidRequest(param, message)
            return found.png, control
        wanted = request.num_frames if control.frames is None else len(control.frames)
        if found.num_frames != wanted:
            message = f"{param} has {found.num_frames} frames, not {wanted}, one for each led"
            raise InvalidRequest(param, message)
        return found.content, control

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
        found = await self.mask(given, request, account_id, param)
        if isinstance(found, StartImage):
            return as_mask(decode_png(found.png)[None])
        return await self._decode(
            lambda: np.concatenate([as_mask(chunk) for chunk in every_frame(found)])
        )

    async def mask(
        self, given: bytes | str, request: VideoRequest, account_id: str, param: str = "mask"
    ) -> SourceVideo | StartImage:
        """Just of the video's size, and a video of as many frames."""
        found = await self._open(given, request, account_id, param)
        if isinstance(found, StartImage):
            size, num_frames = found.size, request.num_frames
        else:
            size, num_frames = (found.shape.width, found.shape.height), found.num_frames
        if size != (request.width, request.height):
            shapes = "{}x{}, the video {}x{}".format(*size, request.width, request.height)
            raise InvalidRequest(param, f"{param}: a mask is {shapes}")
        if num_frames != request.num_frames:
            message = f"{param}: a mask has {num_frames} frames, not {request.num_frames}"
            raise InvalidRequest(param, message)
        return found

    async def _open(
        self, given: bytes | str, request: VideoRequest, account_id: str, param: str
    ) -> SourceVideo | StartImage:
        """A video, or an image that is fitted to the request's size."""
        if isinstance(given, str) and WEB_URL.fullmatch(given):
            given = await self._fetch(given, param)
        if isinstance(given, bytes):
            content = given
            if not await self._decode(lambda: is_video(content)):
                return await self.image(content, (request.width, request.height), param=param)
        return await self.video(given, account_id, param)

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
