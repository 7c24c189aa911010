"""Hears of new job events from PostgreSQL the moment they are committed.

A trigger notifies the channel `job_events` with the job's id. SQLite has nothing of the kind:
there, and while the connection is lost, whoever waits polls.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator

import psycopg
from sqlalchemy import Engine

logger = logging.getLogger("ray.serve")

RECONNECT_S = 1.0
POLL_S, LISTENING_POLL_S = 0.1, 2.0


class EventListener:
    """One connection for all the jobs that are followed in this process."""

    def __init__(self, engine: Engine) -> None:
        self.url: str | None = None
        if engine.dialect.name == "postgresql":
            url = engine.url.set(drivername="postgresql")
            self.url = url.render_as_string(hide_password=False)
        self.waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.is_listening = False
        self.task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def following(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever something happens to the job."""
        if self.task is None and self.url is not None:
            self.task = asyncio.create_task(self._listen(self.url))
        happened = asyncio.Event()
        self.waiting[job_id].add(happened)
        try:
            yield happened
        finally:
            self.waiting[job_id].discard(happened)
            if not self.waiting[job_id]:
                del self.waiting[job_id]

    async def wait(self, happened: asyncio.Event) -> None:
        """Return when something may have happened."""
        timeout_s = LISTENING_POLL_S if self.is_listening else POLL_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(happened.wait(), timeout_s)

    async def close(self) -> None:
        """Stop listening."""
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task

    async def _listen(self, url: str) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    url, autocommit=True
                ) as connection:
                    await connection.execute("LISTEN job_events")
                    self.is_listening = True
                    self._wake(list(self.waiting))  # of what was said before, nothing was heard
                    async for notify in connection.notifies():
                        self._wake([notify.payload])
            except psycopg.OperationalError as error:
                logger.warning("the database is away, job events are polled for: %s", error)
            finally:
                self.is_listening = False
            await asyncio.sleep(RECONNECT_S)

    def _wake(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            for happened in self.waiting.get(job_id, ()):
                happened.set()
