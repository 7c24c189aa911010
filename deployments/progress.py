"""A job's events as server-sent events: replayed from a sequence number, then live."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

from sqlalchemy import Engine

from deployments.database import reader
from deployments.wire import event_json
from jobs.events import events_after
from jobs.job import Job, JobEvent, JobState
from jobs.store import JobNotFound, get_job

POLL_S = 0.1
KEEP_ALIVE_S = 10.0
LAST_EVENTS = {
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


async def stream_events(
    engine: Engine, job: Job, after_seq: int, to_json: Callable[[Job], dict[str, object]]
) -> AsyncIterator[str]:
    """Yield one text/event-stream block an event, to the final one, which carries the video."""
    sent_s = time.monotonic()
    while True:
        try:
            events, current = await asyncio.to_thread(_read, engine, job, after_seq)
        except JobNotFound:
            return  # its owner has deleted it meanwhile
        for event in events:
            after_seq = event.seq
            sent_s = time.monotonic()
            if event.state is None:
                yield _block("progress", event.seq, event_json(event))
            else:
                content = {**event_json(event), "video": to_json(current)}
                yield _block(LAST_EVENTS[event.state], event.seq, content)
                return
        if not events and current.charged is not None:
            return  # the client has seen the final event already
        if time.monotonic() - sent_s > KEEP_ALIVE_S:
            sent_s = time.monotonic()
            yield ": waiting\n\n"
        await asyncio.sleep(POLL_S)


def _read(engine: Engine, job: Job, after_seq: int) -> tuple[list[JobEvent], Job]:
    """Both in one transaction, so that a final event never comes without its final job."""
    with reader(engine).begin() as connection:
        return events_after(connection, job.id, after_seq), get_job(connection, job.id)


def _block(event: str, seq: int, content: dict[str, object]) -> str:
    return f"id: {seq}\nevent: {event}\ndata: {json.dumps(content)}\n\n"
