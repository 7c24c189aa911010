"""Jobs in the database; the only truth about what is queued, running or done.

The caller owns the transaction. Every change of state names the state and the lease that it
starts from, so that of two processes that think they hold a job only one can move it.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    func,
    select,
    update,
)

from jobs.events import append_event
from jobs.job import FINAL_STATES, Job, JobId, JobState, Outcome, Phase, Progress
from jobs.tables import jobs, now_ms


class JobNotFound(Exception):
    """No such job, or another account's."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"No video with id {self.job_id!r}."


class IdempotencyConflict(Exception):
    """The Idempotency-Key was used before, with other fields."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"Idempotency-Key {self.key!r} was used with other fields"


class LeaseLost(Exception):
    """Another worker holds the job now, or it has ended."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"the lease on {self.job_id} is lost"


_IS_OPEN = jobs.c.state.not_in(FINAL_STATES)


def locked_in_order(*wanted: ColumnElement[bool]) -> ColumnElement[bool]:
    """These jobs, for an update of several: whoever changes some of them, too, changes them in the
    same order, and neither waits for the other for ever.
    """
    found = select(jobs.c.number).where(*wanted).order_by(jobs.c.number).with_for_update()
    return jobs.c.number.in_(found)


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
    append_event(connection, job_id, progress, None, percentage=row.percentage)


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
    is_made = outcome.state is JobState.SUCCEEDED
    row = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, is_held)
        .values(
            state=outcome.state,
            finished_at_ms=now_ms(),
            # NULL where kept_ms is, too.
            expires_at_ms=now_ms() + jobs.c.kept_ms if is_made else None,
            lease_owner=None,
            lease_expires_at_ms=None,
            percentage=100 if is_made else jobs.c.percentage,
            charged=outcome.charged,
            refunded=outcome.refunded,
            reason=outcome.reason,
            video_key=outcome.video_key,
            size_bytes=outcome.size_bytes,
            result=outcome.result,
            error_code=outcome.error_code,
            error_message=outcome.error_message,
        )
        .returning(jobs.c.percentage)
    ).first()
    if row is None:
        raise LeaseLost(job_id)
    append_event(connection, job_id, Progress(Phase.DONE, row.percentage), outcome.state)


def request_cancel(connection: Connection, job_id: JobId) -> None:
    """Ask whoever runs the job, or will lease it first, to stop at the next step."""
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.not_in(FINAL_STATES))
        .values(cancel_requested=True)
    )


def request_cancel_of_all(connection: Connection, account_id: str) -> None:
    """Ask the same for all that an account has queued or running."""
    of_account = (jobs.c.account_id == account_id, _IS_OPEN, ~jobs.c.cancel_requested)
    connection.execute(
        update(jobs).where(locked_in_order(*of_account)).values(cancel_requested=True)
    )


def open_jobs(connection: Connection, account_id: str) -> list[Job]:
    """What an account has queued or running."""
    query = select(jobs).where(jobs.c.account_id == account_id, _IS_OPEN)
    return [to_job(row) for row in connection.execute(query)]


def get_job(connection: Connection, job_id: str, account_id: str | None = None) -> Job:
    """The job; JobNotFound if it is deleted or, with account_id given, another account's."""
    query = select(jobs).where(jobs.c.id == job_id, ~jobs.c.deleted)
    if account_id is not None:
        query = query.where(jobs.c.account_id == account_id)
    row = connection.execute(query).first()
    if row is None:
        raise JobNotFound(job_id)
    return to_job(row)


def count_by_state(connection: Connection) -> dict[JobState, int]:
    """How many jobs there are in each state; deleted ones too."""
    rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
    counted = {JobState(state): int(count) for state, count in rows}
    return {state: counted.get(state, 0) for state in JobState}


def stored_bytes(connection: Connection) -> dict[str, int]:
    """What each account's videos take, those that are still to be made by their estimates."""
    taken = case((_IS_OPEN, jobs.c.estimated_bytes), else_=func.coalesce(jobs.c.size_bytes, 0))
    query = (
        select(jobs.c.account_id, func.sum(taken))
        .where(~jobs.c.deleted)
        .group_by(jobs.c.account_id)
    )
    return {account_id: int(count) for account_id, count in connection.execute(query)}


def count_queued(connection: Connection) -> dict[tuple[str, str], int]:
    """How many jobs wait, by tier and account."""
    rows = connection.execute(
        select(jobs.c.tier, jobs.c.account_id, func.count())
        .where(jobs.c.state == JobState.QUEUED)
        .group_by(jobs.c.tier, jobs.c.account_id)
    )
    return {(tier, account_id): int(count) for tier, account_id, count in rows}


def count_lost_leases(connection: Connection) -> int:
    """How often a job was leased again because its holder was gone."""
    query = select(func.coalesce(func.sum(jobs.c.attempt - 1), 0)).where(jobs.c.attempt > 1)
    return int(connection.execute(query).scalar_one())


def find_by_key(connection: Connection, account_id: str, key: str, fields_hash: str) -> Job | None:
    """The job that an account made under an Idempotency-Key, deleted or not.

    IdempotencyConflict if it was made from other fields.
    """
    row = connection.execute(
        select(jobs).where(jobs.c.account_id == account_id, jobs.c.idempotency_key == key)
    ).first()
    if row is not None and row.fields_hash != fields_hash:
        raise IdempotencyConflict(key)
    return None if row is None else to_job(row)


def find_recent(
    connection: Connection, account_id: str, fields_hash: str, max_age_ms: int
) -> Job | None:
    """The account's newest job of these fields without a key, if it is young and has not failed."""
    not_in_vain = (
        jobs.c.idempotency_key.is_(None),
        jobs.c.state.not_in((JobState.FAILED, JobState.CANCELLED)),
        ~jobs.c.deleted,
    )
    return _find_young(connection, account_id, fields_hash, max_age_ms, *not_in_vain)


def find_made_by_retry(
    connection: Connection, account_id: str, fields_hash: str, max_age_ms: int
) -> Job | None:
    """The account's newest job of these fields that a client's own retry made, however it ended."""
    return _find_young(connection, account_id, fields_hash, max_age_ms, jobs.c.made_by_retry)


def _find_young(
    connection: Connection,
    account_id: str,
    fields_hash: str,
    max_age_ms: int,
    *wanted: ColumnElement[bool],
) -> Job | None:
    row = connection.execute(
        select(jobs)
        .where(
            jobs.c.account_id == account_id,
            jobs.c.fields_hash == fields_hash,
            jobs.c.created_at_ms >= now_ms() - max_age_ms,
            *wanted,
        )
        .order_by(jobs.c.number.desc())
        .limit(1)
    ).first()
    return None if row is None else to_job(row)


def jobs_of_reservations(
    connection: Connection, reservation_ids: Collection[str]
) -> dict[str, JobId]:
    """The job that each reservation is held for; deleted ones too."""
    rows = connection.execute(
        select(jobs.c.reservation_id, jobs.c.id).where(jobs.c.reservation_id.in_(reservation_ids))
    )
    return {row.reservation_id: JobId(row.id) for row in rows}


def list_jobs(
    connection: Connection, account_id: str, *, after: str | None, limit: int, ascending: bool
) -> list[Job]:
    """Up to limit jobs by age, beginning behind `after`; JobNotFound if that is not the account's.

    Rows that are added or deleted meanwhile, that of `after` too, shift nothing: the cursor is a
    position, not a count.
    """
    query: Select[Any] = select(jobs).where(jobs.c.account_id == account_id, ~jobs.c.deleted)
    if after is not None:
        number = _place_of(connection, after, account_id)
        query = query.where(jobs.c.number > number if ascending else jobs.c.number < number)
    order = jobs.c.number.asc() if ascending else jobs.c.number.desc()
    return [to_job(row) for row in connection.execute(query.order_by(order).limit(limit))]


def _place_of(connection: Connection, job_id: str, account_id: str) -> int:
    query = select(jobs.c.number).where(jobs.c.id == job_id, jobs.c.account_id == account_id)
    number = connection.execute(query).scalar()
    if number is None:
        raise JobNotFound(job_id)
    return int(number)


def to_job(row: Row[Any]) -> Job:
    """A row of `jobs` as a Job."""
    return Job(**{**row._mapping, "state": JobState(row.state), "id": JobId(row.id)})
