"""What was asked for and when, for whoever wants to ask the same again in a simulation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from jobs.tables import jobs


class RecordedJob(NamedTuple):
    """A job as it came; request as it was stored."""

    created_at_ms: int
    account_id: str
    request: dict[str, Any]


def recorded_jobs(connection: Connection) -> Iterator[RecordedJob]:
    """All of them, the oldest first, a thousand at a time."""
    query = select(jobs.c.created_at_ms, jobs.c.account_id, jobs.c.request).order_by(jobs.c.number)
    rows = connection.execution_options(yield_per=1000).execute(query)
    for row in rows:
        yield RecordedJob(row.created_at_ms, row.account_id, row.request)
