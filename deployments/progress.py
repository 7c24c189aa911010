"""A job's events as they come: replayed from a sequence number, then live, to the final one."""

import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from credits.api_keys import KeyId, check_good
from deployments.database import reader, retry_while_away
from deployments.listener import EventListener
from deployments.wire import event_json
from jobs.events import events_after
from jobs.job import Job, JobEvent, JobState
from jobs.store import JobNotFound, get_job

KEEP_ALIVE_S, AWAY_S = 10.0, 30.0
LAST_EVENTS = {
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",  # as in the Videos API; its error's code is `cancelled`
}


@dataclass(frozen=True, slots=True)
class Moment:
    """An event with its job as it then stood, or as it stands by now."""

    event: JobEvent
    job: Job

    @property
    def name(self) -> str:
        """`progress`, or for the last one how the job ended."""
        return "progress" if self.event.state is None else LAST_EVENTS[self.event.state]

    def content(self, video: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
        """What is sent of it; the last one carries the whole video."""
        content = event_json(self.event, self.job)
        return content if self.event.state is None else {**content, "video": video(self.job)}


class EventFeed:
    """Follows any job from its rows: whoever runs it, and whichever replica is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.listener = EventListener(engine)

    async def follow(self, job: Job, after_seq: int, key_id: KeyId) -> AsyncIterator[Moment | None]:
        """Yield each event behind after_seq, None where nothing is new, and end with the last.

        Ends early when the owner deletes the video. Unauthenticated once the key is revoked,
        OperationalError if the database is away for longer than AWAY_S.
        """
        async with self.listener.following(job.id) as happened:
            while True:
                happened.clear()
                try:
                    read = functools.partial(self._read, job, after_seq, key_id)
                    events, current = await retry_while_away(read, for_s=AWAY_S)
                except JobNotFound:
                    return
                for event in events:
                    after_seq = event.seq
                    yield Moment(event, current)
                    if event.state is not None:
                        return
                if not events:
                    if current.charged is not None:
                        return  # the final event is not behind after_seq
                    yield None
                    await self.listener.wait(happened)

    def _read(self, job: Job, after_seq: int, key_id: KeyId) -> tuple[list[JobEvent], Job]:
        """All in one transaction, so that a final event never comes without its final job."""
        with reader(self.engine).begin() as connection:
            check_good(connection, key_id)
            return events_after(connection, job.id, after_seq), get_job(connection, job.id)


async def stream_events(
    moments: AsyncIterator[Moment | None], video: Callable[[Job], dict[str, Any]]
) -> AsyncIterator[str]:
    """One text/event-stream block a moment, and a comment where there has been none for long."""
    sent_s = time.monotonic()
    async for moment in moments:
        if moment is not None:
            sent_s = time.monotonic()
            data = json.dumps(moment.content(video))
            yield f"id: {moment.event.seq}\nevent: {moment.name}\ndata: {data}\n\n"
        elif time.monotonic() - sent_s > KEEP_ALIVE_S:
            sent_s = time.monotonic()
            yield ": waiting\n\n"
