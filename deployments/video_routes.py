"""The routes that show, stream, download and delete videos, and list the models."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from sqlalchemy import Engine

from credits.accounts import release_bytes
from credits.pricing import WorkWeights
from deployments.admission import Admission
from deployments.authentication import Authenticator, account_of, caller_of, keyed_router
from deployments.create_routes import Waker
from deployments.database import reader, single_reader
from deployments.errors import VideoNotReady
from deployments.openapi import CONTENT_ANSWERS, EVENT_ANSWERS
from deployments.paging import Page
from deployments.progress import EventFeed, stream_events
from deployments.settlement import cancel
from deployments.wire import POLL_AFTER_MS, model_json, video_json
from jobs.job import FINAL_STATES, Job, JobState
from jobs.retention import mark_deleted
from jobs.store import get_job, list_jobs
from media.object_store import LocalObjectStore
from media.renditions import MEDIA_TYPES, SUFFIXES, Rendition, rendition_key
from models.request import InvalidRequest


class VideoRoutes:
    """Handlers over shared tables: nothing about a job is kept in this process."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        store: LocalObjectStore,
        authenticate: Authenticator,
        weights: WorkWeights,
        wake: Waker,
        feed: EventFeed,
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.store = store
        self.authenticate = authenticate
        self.weights = weights
        self.wake = wake
        self.feed = feed

    def router(self) -> APIRouter:
        """All routes; each needs an API key."""
        router = keyed_router(self.authenticate)
        add = router.add_api_route
        add("/v1/videos", self.list_videos, methods=["GET"])
        add("/v1/videos/{video_id}", self.get_video, methods=["GET"])
        add("/v1/videos/{video_id}", self.delete_video, methods=["DELETE"])
        content = "/v1/videos/{video_id}/content"
        file: dict[str, Any] = {"response_class": FileResponse, "responses": CONTENT_ANSWERS}
        add(content, self.get_content, methods=["GET"], **file)
        add(content, self.get_content, methods=["HEAD"], include_in_schema=False)
        add(
            "/v1/videos/{video_id}/events",
            self.get_events,
            methods=["GET"],
            response_class=StreamingResponse,
            responses=EVENT_ANSWERS,
        )
        add("/v1/models", self.list_models, methods=["GET"])
        add("/v1/models/{model_id}", self.get_model, methods=["GET"])
        return router

    def list_videos(
        self, request: Request, page: Annotated[Page, Depends()], after: str | None = None
    ) -> dict[str, Any]:
        """A page of the account's videos, the newest first unless order is asc."""
        account = account_of(request)
        with reader(self.engine).begin() as connection:
            found = list_jobs(
                connection,
                account.id,
                after=after,
                limit=page.limit + 1,
                ascending=page.ascending,
            )
        return page.json([self.video_json(job) for job in found])

    def get_video(self, request: Request, video_id: str) -> JSONResponse:
        """A video as it stands."""
        job = self._find(request, video_id)
        headers = {} if job.state in FINAL_STATES else {"openai-poll-after-ms": POLL_AFTER_MS}
        return JSONResponse(self.video_json(job), headers=headers)

    def delete_video(self, request: Request, video_id: str) -> dict[str, Any]:
        """Delete a finished video, or cancel one that is not.

        A cancelled video stays, as the receipt of what was charged, until it is deleted again.
        """
        job = self._find(request, video_id)
        was_final = job.state in FINAL_STATES
        if not was_final:
            cancel(self.engine, self.store, self.weights, job)
        with self.engine.begin() as connection:
            job = get_job(connection, video_id)
            if was_final or job.state is JobState.SUCCEEDED:
                release_bytes(connection, job.account_id, mark_deleted(connection, job.id))
        self.wake()
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    def get_content(self, request: Request, video_id: str, variant: str = "video") -> Response:
        """The MP4, its thumbnail (WebP) or its sheet of small frames (JPEG); ranges work."""
        job = self._find(request, video_id)
        if variant not in set(Rendition):
            raise InvalidRequest("variant", f"variant must be one of {', '.join(Rendition)}")
        if job.video_key is None:
            raise VideoNotReady(job.id, job.state)
        rendition = Rendition(variant)
        key = rendition_key(job.id, rendition)
        self.store.head(key)
        return FileResponse(
            self.store.path(key),
            media_type=MEDIA_TYPES[rendition],
            filename=f"{job.id}.{SUFFIXES[rendition]}",
        )

    def get_events(
        self,
        request: Request,
        video_id: str,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """The video's events from behind Last-Event-ID to the final one, live."""
        job = self._find(request, video_id)
        seq = last_event_id or "0"
        if not seq.isdecimal() or len(seq) > 9:
            raise InvalidRequest("Last-Event-ID", "Last-Event-ID must be a sequence number")
        return StreamingResponse(
            stream_events(
                self.feed.follow(job, int(seq), caller_of(request).key_id), self.video_json
            ),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )

    def list_models(self) -> dict[str, Any]:
        """The deployed models."""
        plans = self.admission.plans
        models = [model_json(offer, plans) for offer in self.admission.offers.values()]
        return {"object": "list", "data": models}

    def get_model(self, model_id: str) -> dict[str, Any]:
        """One of them; ModelNotFound."""
        return model_json(self.admission.offer(model_id), self.admission.plans)

    def _find(self, request: Request, video_id: str) -> Job:
        account = account_of(request)
        with single_reader(self.engine).begin() as connection:
            return get_job(connection, video_id, account.id)

    def video_json(self, job: Job) -> dict[str, Any]:
        """The Video object of a job."""
        return video_json(job, self.admission.find_model(job.model))
