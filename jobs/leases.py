"""Leases on jobs: who takes which job, for how long, and for which tier.

The caller owns the transaction. A job whose lease has run out is taken by the next that asks.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from jobs.job import Job, JobId, JobState
from jobs.order import first_in_line, turn_of
from jobs.store import LeaseLost, locked_in_order, to_job
from jobs.tables import jobs, now_ms

DEFAULT_AGEING_MS = 600_000

_HAS_RUN_OUT = jobs.c.lease_expires_at_ms < now_ms()


def lease(
    connection: Connection,
    owner: str,
    tiers: Sequence[str],
    lease_ms: int,
    but: Collection[JobId] = (),
    ageing_ms: int = DEFAULT_AGEING_MS,
    min_priority: int = 0,
) -> Job | None:
    """Take the next job of these tiers: one that is queued, or whose lease has run out.

    but: jobs that owner is at work on, whose leases it let run out unawares. ageing_ms: see
    `jobs.order`. min_priority: none of a lower one.
    """
    asked = {
        "of_tiers": list(tiers),
        "but_ids": list(but),
        "least_priority": min_priority,
        "age_ms": ageing_ms,
        "by_owner": owner,
        "for_ms": lease_ms,
    }
    row = connection.execute(_LEASE_FIRST, asked).first()
    return None if row is None else to_job(row)


def lease_for(
    connection: Connection,
    owner: str,
    tier: str,
    *,
    of_tiers: Sequence[str],
    models: Sequence[str],
    min_wait_ms: int,
    lease_ms: int,
) -> Job | None:
    """Take, for a tier, a job of others that has waited min_wait_ms at least: of the highest plan
    the oldest.
    """
    waiting = and_(
        jobs.c.state == JobState.QUEUED,
        jobs.c.tier.in_(of_tiers),
        jobs.c.model.in_(models),
        jobs.c.created_at_ms <= now_ms() - min_wait_ms,
    )
    order = (jobs.c.priority.desc(), jobs.c.created_at_ms)
    candidate = select(jobs.c.number).where(waiting).order_by(*order)
    turn = turn_of(jobs.c.account_id, literal(tier))
    return _take_first(connection, owner, candidate, lease_ms, tier=tier, turn=turn)


def lease_overdue(connection: Connection, owner: str, max_age_ms: int, lease_ms: int) -> Job | None:
    """Take a job of any tier that nobody has finished max_age_ms after it was queued."""
    overdue = and_(jobs.c.created_at_ms < now_ms() - max_age_ms, _is_free())
    candidate = select(jobs.c.number).where(overdue).order_by(jobs.c.number)
    return _take_first(connection, owner, candidate, lease_ms)


def extend_leases(
    connection: Connection, owner: str, job_ids: Collection[JobId], lease_ms: int
) -> set[JobId]:
    """Heartbeat: extend the leases on these jobs and return those that owner still holds.

    A job that owner has given up, because it could not be settled, is not named and runs out.
    """
    rows = connection.execute(
        update(jobs)
        .where(
            locked_in_order(
                jobs.c.id.in_(job_ids),
                jobs.c.lease_owner == owner,
                jobs.c.state == JobState.RUNNING,
            )
        )
        .values(lease_expires_at_ms=now_ms() + lease_ms)
        .returning(jobs.c.id)
    )
    return {JobId(row.id) for row in rows}


def move(connection: Connection, job_id: JobId, owner: str, tier: str) -> None:
    """Queue a job that owner holds for another tier; LeaseLost unless owner holds it."""
    row = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.lease_owner == owner, jobs.c.state == JobState.RUNNING)
        .values(
            state=JobState.QUEUED,
            tier=tier,
            turn=turn_of(jobs.c.account_id, literal(tier)),
            lease_owner=None,
            lease_expires_at_ms=None,
        )
        .returning(jobs.c.id)
    ).first()
    if row is None:
        raise LeaseLost(job_id)


def _is_free() -> ColumnElement[bool]:
    ran_out = and_(jobs.c.state == JobState.RUNNING, _HAS_RUN_OUT)
    return or_(jobs.c.state == JobState.QUEUED, ran_out)


def _take_first(
    connection: Connection, owner: str, candidates: Select[Any], lease_ms: int, **changes: Any
) -> Job | None:
    """Lease the first of these jobs that no other transaction is at, and change its columns."""
    first = candidates.limit(1).with_for_update(skip_locked=True, of=jobs)
    statement = _leasing(first).values(**changes)
    row = connection.execute(statement, {"by_owner": owner, "for_ms": lease_ms}).first()
    return None if row is None else to_job(row)


def _leasing(number: Select[Any]) -> ReturningUpdate[Any]:
    """Give the job of that number to by_owner for for_ms."""
    return (
        update(jobs)
        .where(jobs.c.number == number.scalar_subquery())
        .values(
            state=JobState.RUNNING,
            lease_owner=bindparam("by_owner", type_=String()),
            lease_expires_at_ms=now_ms() + bindparam("for_ms", type_=BigInteger()),
            started_at_ms=func.coalesce(jobs.c.started_at_ms, now_ms()),
            attempt=jobs.c.attempt + 1,
        )
        .returning(*jobs.c)
    )


# Built once: building it takes longer than running it.
_LEASE_FIRST = _leasing(
    first_in_line(
        and_(
            jobs.c.tier.in_(bindparam("of_tiers", expanding=True)),
            jobs.c.id.not_in(bindparam("but_ids", expanding=True)),
        ),
        bindparam("least_priority", type_=Integer()),
        bindparam("age_ms", type_=BigInteger()),
        _HAS_RUN_OUT,
    )
)
