"""Jobs and their events in the database; the only truth about what is queued, running or done.

The caller owns the transaction. Every change of state names the state and the lease that it
starts from, so that of two processes that think they hold a job only one can move it.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    and_,
    case,
    false,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from jobs.job import FINAL_STATES, Job, JobEvent, JobId, JobState, Outcome, Phase, Progress

metadata = MetaData()


class now_ms(FunctionElement[int]):
    """The database's clock, in milliseconds since 1970."""

    inherit_cache = True
    type = BigInteger()


@compiles(now_ms, "sqlite")
def _now_ms_sqlite(*_: Any, **__: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@compiles(now_ms, "postgresql")
def _now_ms_postgresql(*_: Any, **__: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),
    Column("account_id", String, nullable=False),
    Column("state", String, nullable=False),
    Column("model", String, nullable=False),
    Column("tier", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("request", JSON, nullable=False),
    Column("quoted", BigInteger, nullable=False),
    Column("quote_exact", String, nullable=False),
    Column("reservation_id", String, nullable=False, unique=True),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("started_at_ms", BigInteger),
    Column("finished_at_ms", BigInteger),
    Column("lease_owner", String),
    Column("lease_expires_at_ms", BigInteger),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("percentage", Integer, nullable=False, server_default=text("0")),
    Column("cancel_requested", Boolean, nullable=False, server_default=false()),
    Column("deleted", Boolean, nullable=False, server_default=false()),
    Column("charged", BigInteger),
    Column("refunded", BigInteger),
    Column("reason", String),
    Column("video_key", String),
    Column("result", JSON(none_as_null=True)),
    Column("error_code", String),
    Column("error_message", String),
    CheckConstraint(
        "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state_known"
    ),
    CheckConstraint(
        "(state IN ('queued', 'running')) = (charged IS NULL)", name="final_means_settled"
    ),
    CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name="running_is_leased"),
    Index("jobs_of_account", "account_id", "number"),
    Index("jobs_open", "state", "tier", "priority", "number"),
    Index(
        "jobs_purgeable",
        "number",
        sqlite_where=text("deleted AND video_key IS NOT NULL"),
        postgresql_where=text("deleted AND video_key IS NOT NULL"),
    ),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String, ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("phase", String, nullable=False),
    Column("percentage", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("frame", Integer, nullable=False),
    Column("num_frames", Integer, nullable=False),
    Column("state", String),
    Column("created_at_ms", BigInteger, nullable=False),
)


class JobNotFound(Exception):
    """No such job, or another account's."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"No video with id {self.job_id!r}."


class LeaseLost(Exception):
    """Another worker holds the job now, or it has ended."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"the lease on {self.job_id} is lost"


def enqueue(connection: Connection, values: dict[str, Any]) -> Job:
    """Insert a queued job with its first event; values name the columns of a new row."""
    inserted = connection.execute(
        insert(jobs)
        .values(state=JobState.QUEUED, created_at_ms=now_ms(), **values)
        .returning(*jobs.c)
    ).one()
    _append_event(connection, inserted.id, Progress(Phase.QUEUED, 0), None)
    return _to_job(inserted)


def count_open(connection: Connection, account_id: str) -> int:
    """How many of an account's jobs are queued or running."""
    return connection.execute(
        select(func.count())
        .select_from(jobs)
        .where(jobs.c.account_id == account_id, jobs.c.state.not_in(FINAL_STATES))
    ).scalar_one()


def lease(
    connection: Connection,
    owner: str,
    tiers: Sequence[str],
    lease_ms: int,
    but: Collection[JobId] = (),
) -> Job | None:
    """Take the next job of these tiers: one that is queued, or whose lease has run out.

    but: jobs that owner is at work on, whose leases it let run out unawares.
    """
    candidate = (
        select(jobs.c.number)
        .where(
            jobs.c.tier.in_(tiers),
            jobs.c.id.not_in(but),
            or_(
                jobs.c.state == JobState.QUEUED,
                and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_expires_at_ms < now_ms()),
            ),
        )
        .order_by(jobs.c.priority.desc(), jobs.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = connection.execute(
        update(jobs)
        .where(jobs.c.number == candidate.scalar_subquery())
        .values(
            state=JobState.RUNNING,
            lease_owner=owner,
            lease_expires_at_ms=now_ms() + lease_ms,
            started_at_ms=func.coalesce(jobs.c.started_at_ms, now_ms()),
            attempt=jobs.c.attempt + 1,
        )
        .returning(*jobs.c)
    ).first()
    return None if row is None else _to_job(row)


def extend_leases(
    connection: Connection, owner: str, job_ids: Collection[JobId], lease_ms: int
) -> set[JobId]:
    """Heartbeat: extend the leases on these jobs and return those that owner still holds.

    A job that owner has given up, because it could not be settled, is not named and runs out.
    """
    rows = connection.execute(
        update(jobs)
        .where(
            jobs.c.id.in_(job_ids), jobs.c.lease_owner == owner, jobs.c.state == JobState.RUNNING
        )
        .values(lease_expires_at_ms=now_ms() + lease_ms)
        .returning(jobs.c.id)
    )
    return {JobId(row.id) for row in rows}


def cancelled_of(connection: Connection, owner: str) -> list[JobId]:
    """The jobs that owner holds and whose cancellation is asked for."""
    rows = connection.execute(
        select(jobs.c.id).where(
            jobs.c.lease_owner == owner,
            jobs.c.state == JobState.RUNNING,
            jobs.c.cancel_requested,
        )
    )
    return [JobId(row.id) for row in rows]


def record(connection: Connection, job_id: JobId, owner: str, progress: Progress) -> None:
    """Append an event; LeaseLost unless owner holds the job. The percentage never goes back."""
    row = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.lease_owner == owner, jobs.c.state == JobState.RUNNING)
        .values(
            percentage=case(
                (jobs.c.percentage < progress.percentage, progress.percentage),
                else_=jobs.c.percentage,
            )
        )
        .returning(jobs.c.percentage)
    ).first()
    if row is None:
        raise LeaseLost(job_id)
    _append_event(connection, job_id, progress, None, percentage=row.percentage)


def finish(
    connection: Connection, job_id: JobId, *, lease_owner: str | None, outcome: Outcome
) -> None:
    """Move a job to its final state with its last event.

    lease_owner None ends a job that is still queued. LeaseLost if it is not as the caller thinks.
    """
    is_held = (
        jobs.c.state == JobState.QUEUED
        if lease_owner is None
        else and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_owner == lease_owner)
    )
    row = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, is_held)
        .values(
            state=outcome.state,
            finished_at_ms=now_ms(),
            lease_owner=None,
            lease_expires_at_ms=None,
            percentage=100 if outcome.state is JobState.SUCCEEDED else jobs.c.percentage,
            charged=outcome.charged,
            refunded=outcome.refunded,
            reason=outcome.reason,
            video_key=outcome.video_key,
            result=outcome.result,
            error_code=outcome.error_code,
            error_message=outcome.error_message,
        )
        .returning(jobs.c.percentage)
    ).first()
    if row is None:
        raise LeaseLost(job_id)
    _append_event(connection, job_id, Progress(Phase.DONE, row.percentage), outcome.state)


def request_cancel(connection: Connection, job_id: JobId) -> None:
    """Ask whoever runs the job to stop at the next step."""
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state == JobState.RUNNING)
        .values(cancel_requested=True)
    )


def mark_deleted(connection: Connection, job_id: JobId) -> None:
    """Hide a finished job from its owner; `purgeable` then lists what its files are."""
    connection.execute(
        update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(FINAL_STATES)).values(deleted=True)
    )


def purgeable(connection: Connection, limit: int = 100) -> list[Job]:
    """Deleted jobs whose files may still exist."""
    query = select(jobs).where(jobs.c.deleted, jobs.c.video_key.is_not(None)).limit(limit)
    return [_to_job(row) for row in connection.execute(query)]


def mark_purged(connection: Connection, job_id: JobId) -> None:
    """The files of a deleted job are gone."""
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(video_key=None))


def get_job(connection: Connection, job_id: str, account_id: str | None = None) -> Job:
    """The job; JobNotFound if it is deleted or, with account_id given, another account's."""
    query = select(jobs).where(jobs.c.id == job_id, ~jobs.c.deleted)
    if account_id is not None:
        query = query.where(jobs.c.account_id == account_id)
    row = connection.execute(query).first()
    if row is None:
        raise JobNotFound(job_id)
    return _to_job(row)


def list_jobs(
    connection: Connection, account_id: str, *, after: str | None, limit: int, ascending: bool
) -> list[Job]:
    """Up to limit jobs by age, beginning behind `after`; JobNotFound if that is not the account's.

    Rows that are added meanwhile shift nothing: the cursor is a position, not a count.
    """
    query: Select[Any] = select(jobs).where(jobs.c.account_id == account_id, ~jobs.c.deleted)
    if after is not None:
        number = get_job(connection, after, account_id).number
        query = query.where(jobs.c.number > number if ascending else jobs.c.number < number)
    order = jobs.c.number.asc() if ascending else jobs.c.number.desc()
    return [_to_job(row) for row in connection.execute(query.order_by(order).limit(limit))]


def events_after(connection: Connection, job_id: JobId, seq: int) -> list[JobEvent]:
    """The events of a job behind seq, in order; seq 0 gives all."""
    rows = connection.execute(
        select(job_events)
        .where(job_events.c.job_id == job_id, job_events.c.seq > seq)
        .order_by(job_events.c.seq)
    )
    return [
        JobEvent(
            row.seq,
            Progress(
                Phase(row.phase),
                row.percentage,
                row.step,
                row.num_steps,
                row.frame,
                row.num_frames,
            ),
            row.created_at_ms,
            None if row.state is None else JobState(row.state),
        )
        for row in rows
    ]


def _append_event(
    connection: Connection,
    job_id: str,
    progress: Progress,
    state: JobState | None,
    *,
    percentage: int | None = None,
) -> None:
    last = select(func.coalesce(func.max(job_events.c.seq), 0) + 1).where(
        job_events.c.job_id == job_id
    )
    connection.execute(
        insert(job_events).values(
            job_id=job_id,
            seq=last.scalar_subquery(),
            phase=progress.phase,
            percentage=progress.percentage if percentage is None else percentage,
            step=progress.step,
            num_steps=progress.num_steps,
            frame=progress.frame,
            num_frames=progress.num_frames,
            state=state,
            created_at_ms=now_ms(),
        )
    )


def _to_job(row: Row[Any]) -> Job:
    return Job(**{**row._mapping, "state": JobState(row.state), "id": JobId(row.id)})
