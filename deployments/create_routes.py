"""The routes that make videos: from words, from an image, from another video; and their price."""

import re
from dataclasses import replace
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from deployments.admission import Admission, Inputs
from deployments.authentication import Authenticator, account_of, caller_of, keyed_router
from deployments.config import LimitsConfig
from deployments.errors import VideoFailed
from deployments.estimate import make_estimate
from deployments.idempotency import Attempt, read_attempt
from deployments.openapi import CREATE_BODY, DERIVE_BODY, REMIX_BODY, SYNC_ANSWERS
from deployments.progress import EventFeed
from deployments.remix import kept_fields
from deployments.request_body import CreateBody, parse_fps, read_create_body
from deployments.source_video import SourceVideo
from deployments.sources import Sources
from deployments.url_guard import UrlGuardConfig
from deployments.wire import POLL_AFTER_MS, STATUSES, quote_json, video_json
from jobs.job import Job, JobState
from media.object_store import LocalObjectStore
from models.request import InvalidRequest, NotSupported, VideoRequest
from models.spec import Use

EDIT_STRENGTH = 0.6
GENERATED_FRAMES = range(4, 130)  # of the founding API: 128 and the first frame
PENDING = "inputs/pending"


class Waker(Protocol):
    """Tells the pipeline that there is something to do; losing the call only delays it."""

    def __call__(self) -> None:
        """Return at once."""


class CreateRoutes:
    """Every way to a new job leads through one admission."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        store: LocalObjectStore,
        authenticate: Authenticator,
        limits: LimitsConfig,
        image_urls: UrlGuardConfig,
        wake: Waker,
        feed: EventFeed,
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.store = store
        self.authenticate = authenticate
        self.limits = limits
        self.sources = Sources(engine, store, limits, image_urls)
        self.wake = wake
        self.feed = feed

    def router(self) -> APIRouter:
        """All routes; each needs an API key."""
        router = keyed_router(self.authenticate)

        def add(path: str, route: Any, body: dict[str, Any], **what: Any) -> None:
            router.add_api_route(path, route, methods=["POST"], openapi_extra=body, **what)

        add("/v1/videos", self.create, CREATE_BODY)
        sync = {"response_class": FileResponse, "responses": SYNC_ANSWERS}
        add("/v1/videos/sync", self.create_and_wait, CREATE_BODY, **sync)
        add("/v1/videos/edits", self.edit, DERIVE_BODY)
        add("/v1/videos/extensions", self.extend, DERIVE_BODY)
        add("/v1/videos/{video_id}/remix", self.remix, REMIX_BODY)
        add("/api/v1/video/estimate", self.estimate, CREATE_BODY)
        add("/api/v1/video/generate", self.generate, CREATE_BODY, status_code=202)
        characters = "/v1/videos/characters"
        router.add_api_route(characters, self.refuse_characters, methods=["POST"])
        router.add_api_route(f"{characters}/{{name}}", self.refuse_characters, methods=["GET"])
        return router

    async def create(self, request: Request) -> JSONResponse:
        """Queue a video; the answer is the Videos API's Video."""
        return self._answer(await self._create(request))

    async def generate(self, request: Request) -> JSONResponse:
        """Queue a video; the answer, 202, is its job and its price."""
        job = await self._create(request, GENERATED_FRAMES)
        content = {
            "job_id": job.id,
            "status": STATUSES[job.state],
            "quoted": job.quoted,
            "reservation_id": job.reservation_id,
            "video": self._video(job),
        }
        return JSONResponse(content, 202)

    async def create_and_wait(self, request: Request) -> FileResponse:
        """Queue a video and answer with its MP4 once it is there; VideoFailed if it never will be.

        A client that leaves meanwhile finds the job in its list; sent again, the request finds it
        too.
        """
        job = await self._create(request)
        async for moment in self.feed.follow(job, 0, caller_of(request).key_id):
            job = job if moment is None else moment.job
        if job.state is not JobState.SUCCEEDED or job.video_key is None:
            raise VideoFailed(job.id, job.error_code or "deleted", job.error_message or "deleted")
        return FileResponse(
            self.store.path(job.video_key),
            media_type="video/mp4",
            filename=f"{job.id}.mp4",
            headers={"x-video-id": job.id, "x-model": job.model, "x-charged": str(job.charged)},
        )

    async def estimate(self, request: Request) -> dict[str, Any]:
        """The price of a request that is not made, of any family that has a price."""
        body = await read_create_body(request)
        estimate = await run_in_threadpool(make_estimate, self.admission, body, self.limits)
        return quote_json(estimate)

    async def remix(self, request: Request, video_id: str) -> JSONResponse:
        """The same video with other words: its settings and its seed, unless they are given."""
        body = await read_create_body(request)
        attempt = read_attempt(request, body, f"remix {video_id}")
        if (first := await self._find_first(request, attempt)) is not None:
            return self._answer(first)
        owner = account_of(request).id
        job = await run_in_threadpool(self.sources.find_finished, video_id, owner)
        former = VideoRequest.model_validate(job.request)
        kept = kept_fields(former, job.model, body)
        if former.start_image is not None and body.image is None:  # its file is gone by now
            source = await self.sources.video(job.id, owner)
            body = replace(body, image=source.first_frame)
        body = replace(body, model=job.model, fields={**kept, **body.fields})
        resolved = self._resolve(body).model_copy(update={"remixed_from": job.id})
        return self._answer(await self._admit(request, body, resolved, {}, attempt))

    async def edit(self, request: Request) -> JSONResponse:
        """Change a video towards new words; strength says how much of it is made anew."""
        body = await read_create_body(request, derived=True)
        attempt = read_attempt(request, body, "edit")
        if (first := await self._find_first(request, attempt)) is not None:
            return self._answer(first)
        self.admission.check_may_derive(account_of(request))
        self.admission.offer(body.model).model.check_inputs(
            start_image=body.image is not None, source_video=True
        )
        source = await self.sources.video(body.video, account_of(request).id)
        size = {} if "size" in body.fields else _size_of(source)
        strength = {} if "denoising_start" in body.fields else {"strength": EDIT_STRENGTH}
        if body.mask is not None:  # what is white is made anew, as a rule from the beginning
            strength = {name: 1.0 for name in strength}
        fields = {**strength, "fps": source.shape.fps, **size, **body.fields}
        num_frames = source.frames_at(parse_fps(fields["fps"]))
        if "seconds" not in fields:
            fields.setdefault("num_frames", num_frames)
        body = replace(body, fields=fields)
        resolved = self._resolve(body)
        if resolved.num_frames > num_frames:
            message = f"the video has {num_frames} frames at {resolved.fps} a second"
            raise InvalidRequest("num_frames", message)
        inputs = {"source_video": source.content}
        if body.mask is not None:
            mask = await self.sources.mask(body.mask, resolved, account_of(request).id)
            inputs["mask"] = mask.content if isinstance(mask, SourceVideo) else mask.png
        return self._answer(await self._admit(request, body, resolved, inputs, attempt))

    async def extend(self, request: Request) -> JSONResponse:
        """Go on from a video's last frame; the result is both, one after the other."""
        body = await read_create_body(request, derived=True)
        given = {
            **body.fields,
            "input_reference": body.image,
            "crop": body.crop,
            "mask": body.mask,
        }
        for name in (
            *("strength", "size", "width", "height", "fps", "input_reference", "crop"),
            *("control", "denoising_start", "mask"),
        ):
            if given.get(name) is not None:
                raise InvalidRequest(name, f"{name}: an extension is as the video that it extends")
        attempt = read_attempt(request, body, "extend")
        if (first := await self._find_first(request, attempt)) is not None:
            return self._answer(first)
        self.admission.check_may_derive(account_of(request))
        model = self.admission.offer(body.model).model
        if model.start_image is Use.REFUSED:  # it begins from the video's last frame
            raise NotSupported("video", f"{model.id} does not go on from videos")
        source = await self.sources.video(body.video, account_of(request).id)
        fields = {"fps": source.shape.fps, **_size_of(source), **body.fields}
        fields = replace(body, fields=fields).with_size_and_frames(source.shape.fps)
        most = model.max_frames - 1  # beside the one that it begins from
        asked = fields.get("num_frames", min(model.manifest.defaults.num_frames, most))
        if re.fullmatch(r"0*[1-9][0-9]{0,5}", str(asked)) is None:
            raise InvalidRequest("num_frames", "num_frames must be a whole number above 0")
        if int(asked) > most:
            message = f"an extension by {model.id} has at most {most} frames"
            raise InvalidRequest("num_frames", message)
        fields["num_frames"] = int(asked) + 1  # the one that it begins from is there already
        body = replace(body, fields=fields, image=source.last_frame)
        resolved = self._resolve(body).model_copy(update={"continued_frames": source.num_frames})
        if source.num_frames + int(asked) > self.limits.max_source_frames:
            message = f"an extended video has at most {self.limits.max_source_frames} frames"
            raise InvalidRequest("video", message)
        inputs = {"continues": source.content}
        return self._answer(await self._admit(request, body, resolved, inputs, attempt))

    async def refuse_characters(self) -> None:
        """The API has characters; no model here does."""
        raise NotSupported(None, "characters are not supported by any model here")

    async def _create(self, request: Request, frames: range | None = None) -> Job:
        """frames: how many this route makes, whatever the model can."""
        body = await read_create_body(request)
        attempt = read_attempt(request, body, "create")
        if (first := await self._find_first(request, attempt)) is not None:
            return first
        resolved = self._resolve(body)
        if frames is not None and resolved.num_frames not in frames:
            message = f"num_frames must be {frames[0]} to {frames[-1]}"
            raise InvalidRequest("num_frames", message)
        return await self._admit(request, body, resolved, {}, attempt)

    async def _find_first(self, request: Request, attempt: Attempt) -> Job | None:
        """What was made of this request before, whatever has become of its video since."""
        if attempt.is_first:
            return None
        return await run_in_threadpool(self.admission.find_first, account_of(request), attempt)

    def _resolve(self, body: CreateBody) -> VideoRequest:
        return body.resolve(self.admission.offer(body.model).model, self.limits)

    async def _admit(
        self,
        request: Request,
        body: CreateBody,
        resolved: VideoRequest,
        inputs: Inputs,
        attempt: Attempt,
    ) -> Job:
        """Refuse what can be refused before an image is fetched and decoded, then admit."""
        account = account_of(request)
        model = self.admission.offer(resolved.model).model
        model.check_inputs(
            start_image=body.image is not None, source_video="source_video" in inputs
        )
        given = {"start_image": body.image, "control_reference": body.control_reference}
        named = [*inputs, *(name for name, source in given.items() if source is not None)]
        if len(named) > len(inputs):
            pending = dict.fromkeys(named, PENDING)
            self.admission.check(account, resolved.model_copy(update=pending))
        size = resolved.width, resolved.height
        if body.image is not None:
            image = await self.sources.image(body.image, size, body.crop)
            resolved = resolved.model_copy(update={"start_image_aspect": image.aspect})
            inputs = {**inputs, "start_image": image.png}
        elif body.crop is not None:
            raise InvalidRequest("crop", "crop is of a start image, and there is none")
        if body.control_reference is not None:
            reference, control = await self.sources.control(
                body.control_reference, resolved, model, account.id
            )
            resolved = resolved.model_copy(update={"control": control})
            inputs = {**inputs, "control_reference": reference}
        if body.region_masks:
            masks = await self.sources.masks(body.region_masks, resolved, account.id, "regions")
            inputs = {**inputs, "region_masks": masks}
        job = await run_in_threadpool(self.admission.admit, account, resolved, inputs, attempt)
        self.wake()
        return job

    def _answer(self, job: Job) -> JSONResponse:
        headers = {"openai-poll-after-ms": POLL_AFTER_MS}
        return JSONResponse(self._video(job), headers=headers)

    def _video(self, job: Job) -> dict[str, Any]:
        return video_json(job, self.admission.find_model(job.model))


def _size_of(source: SourceVideo) -> dict[str, Any]:
    return {"width": source.shape.width, "height": source.shape.height}
