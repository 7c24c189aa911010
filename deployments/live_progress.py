"""Live progress over Socket.IO at /ws/socket.io, from the same rows as server-sent events.

Websocket transport alone: long polling would need every request of a client to reach the same
replica. A client connects with `auth: {"token": KEY}` (or the Authorization header), then emits
`subscribe {"video_id": ID, "after": SEQ}` and receives `progress`, last `completed` or `failed`.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import socketio
from socketio.exceptions import ConnectionRefusedError
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool

from credits.api_keys import KeyId, Unauthenticated
from credits.rates import RateLimited
from deployments.authentication import Authenticator, Caller, bearer
from deployments.database import reader
from deployments.errors import answer_for, envelope
from deployments.progress import EventFeed, Moment
from jobs.job import Job
from jobs.store import JobNotFound, get_job
from models.request import InvalidRequest

logger = logging.getLogger("ray.serve")

PATH = "/ws/socket.io"
MAX_SUBSCRIPTIONS = 64


class LiveProgress:
    """The Socket.IO server of one replica; it shares nothing with the others but the database."""

    def __init__(
        self,
        engine: Engine,
        feed: EventFeed,
        authenticate: Authenticator,
        video: Callable[[Job], dict[str, Any]],
    ) -> None:
        self.engine = engine
        self.feed = feed
        self.authenticate = authenticate
        self.video = video
        self.callers: dict[str, Caller] = {}
        self.tasks: dict[str, dict[str, asyncio.Task[None]]] = {}
        self.server = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])
        self.server.on("connect", self.connect)
        self.server.on("disconnect", self.disconnect)
        self.server.on("subscribe", self.subscribe)
        self.server.on("unsubscribe", self.unsubscribe)

    def app(self) -> Any:
        """The ASGI application to mount at PATH."""
        return socketio.ASGIApp(self.server, socketio_path="")

    async def connect(self, sid: str, environ: dict[str, Any], auth: Any = None) -> None:
        """Let in whoever has a good key."""
        try:
            token = auth.get("token") if isinstance(auth, dict) else None
            if not isinstance(token, str):
                token = bearer(environ.get("HTTP_AUTHORIZATION", ""))
            self.callers[sid] = await run_in_threadpool(self.authenticate.identify, token)
        except (Unauthenticated, RateLimited) as error:
            raise ConnectionRefusedError(_fault(error)) from error
        self.tasks[sid] = {}

    async def disconnect(self, sid: str, _reason: str) -> None:
        """Stop all that was followed for this client."""
        self.callers.pop(sid, None)
        for task in self.tasks.pop(sid, {}).values():
            task.cancel()

    async def subscribe(self, sid: str, said: Any = None) -> dict[str, Any]:
        """Follow a video from behind `after`; the acknowledgement says {"ok": true} or the error.

        A second subscription to the same video takes the place of the first.
        """
        caller, tasks = self.callers[sid], self.tasks[sid]
        try:
            video_id, after_seq = _read_subscription(said)
            job = await run_in_threadpool(self._find, video_id, caller)
            if video_id not in tasks and len(tasks) >= MAX_SUBSCRIPTIONS:
                message = f"at most {MAX_SUBSCRIPTIONS} videos are followed at once"
                raise InvalidRequest("video_id", message)
        except (InvalidRequest, JobNotFound) as error:
            return _fault(error)
        if self.tasks.get(sid) is not tasks:
            return {"ok": False}  # the client has left meanwhile
        if (former := tasks.pop(video_id, None)) is not None:
            former.cancel()
        tasks[video_id] = asyncio.create_task(self._follow(sid, job, after_seq, caller.key_id))
        return {"ok": True}

    async def unsubscribe(self, sid: str, said: Any = None) -> dict[str, Any]:
        """Stop following a video."""
        try:
            video_id, _ = _read_subscription(said)
        except InvalidRequest as error:
            return _fault(error)
        if (task := self.tasks[sid].pop(video_id, None)) is not None:
            task.cancel()
        return {"ok": True}

    async def _follow(self, sid: str, job: Job, after_seq: int, key_id: KeyId) -> None:
        moment: Moment | None
        try:
            async for moment in self.feed.follow(job, after_seq, key_id):
                if moment is not None:
                    content = {"video_id": job.id, **moment.content(self.video)}
                    await self.server.emit(moment.name, content, to=sid)
        except (Unauthenticated, OperationalError) as error:
            # The client learns of it, may connect again, and goes on from the last seq it saw.
            logger.warning("progress of %s ends: %s", job.id, error)
            await self.server.disconnect(sid)
        finally:
            tasks = self.tasks.get(sid, {})
            if tasks.get(job.id) is asyncio.current_task():
                del tasks[job.id]

    def _find(self, video_id: str, caller: Caller) -> Job:
        with reader(self.engine).begin() as connection:
            return get_job(connection, video_id, caller.account.id)


def _read_subscription(said: Any) -> tuple[str, int]:
    if not isinstance(said, dict) or not isinstance(said.get("video_id"), str):
        raise InvalidRequest("video_id", "video_id must be a string")
    if re.fullmatch(r"[\w-]{1,100}", said["video_id"], re.ASCII) is None:
        raise InvalidRequest("video_id", "video_id must be the id of a video")
    after_seq = said.get("after", 0)
    if type(after_seq) is not int or not 0 <= after_seq < 10**9:
        raise InvalidRequest("after", "after must be a sequence number")
    return said["video_id"], after_seq


def _fault(error: Exception) -> dict[str, Any]:
    return envelope(answer_for(error), str(error), getattr(error, "param", None))
