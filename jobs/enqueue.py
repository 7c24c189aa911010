"""How a job comes to be: a queued row with its first event. The caller owns the transaction."""

from typing import Any

from sqlalchemy import (
    Connection,
    FromClause,
    Row,
    Select,
    String,
    bindparam,
    insert,
    literal,
    select,
)

from jobs.events import append_event, first_event
from jobs.job import Job, JobState, Phase, Progress
from jobs.order import turn_of
from jobs.tables import jobs, now_ms

NEW_COLUMNS = (
    "id", "account_id", "model", "tier", "priority", "request", "quoted", "quote_exact",
    "reservation_id", "idempotency_key", "fields_hash", "estimated_bytes", "kept_ms",
    "made_by_retry", "shape", "num_steps",
)  # fmt: skip
_GIVEN = (jobs.c.number, jobs.c.created_at_ms, jobs.c.turn)
# Built once: it is run for every job that is made.
_TURN = turn_of(bindparam("of_account", type_=String()), bindparam("on_tier", type_=String()))
_ENQUEUE = insert(jobs).values(created_at_ms=now_ms(), turn=_TURN).returning(*_GIVEN)


def enqueue(connection: Connection, values: dict[str, Any]) -> Job:
    """Insert a queued job with its first event; values name the columns of a new row."""
    given = {"of_account": values["account_id"], "on_tier": values["tier"], **values}
    inserted = connection.execute(_ENQUEUE, {"state": JobState.QUEUED, **given}).one()
    append_event(connection, values["id"], Progress(Phase.QUEUED, 0), None)
    return queued_job(inserted, values)


def enqueue_statement(source: FromClause) -> Select[Any]:
    """`enqueue` as the end of a larger statement of PostgreSQL's: a job if source has its row.

    `enqueue_parameters` are its parameters, `queued_job` takes its row.
    """
    values = [bindparam(f"new_{name}", type_=jobs.c[name].type) for name in NEW_COLUMNS]
    turn = turn_of(
        bindparam("new_account_id", type_=String()), bindparam("new_tier", type_=String())
    )
    row = select(literal(JobState.QUEUED.value), now_ms(), turn, *values).select_from(source)
    job = (
        insert(jobs)
        .from_select(["state", "created_at_ms", "turn", *NEW_COLUMNS], row)
        .returning(*_GIVEN, jobs.c.id)
        .cte("job")
    )
    event = first_event(job.c.id, job.c.created_at_ms).cte("event")
    return select(job.c.number, job.c.created_at_ms, job.c.turn).add_cte(event)


def enqueue_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Named apart from all columns: a parameter with a column's name would be set in any UPDATE."""
    return {f"new_{name}": values[name] for name in NEW_COLUMNS}


def queued_job(given: Row[Any], values: dict[str, Any]) -> Job:
    """The job that was enqueued with these values, and what the database gave it."""
    return Job(**values, **given._mapping, state=JobState.QUEUED)
