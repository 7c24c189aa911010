"""How much work the job table holds: counted in groups of like jobs, however many there are."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Select,
    and_,
    case,
    cast,
    func,
    select,
)

from jobs.job import OPEN_STATES, JobState
from jobs.tables import jobs, now_ms

# Requests of one minute count as of one moment, of twenty where that is long ago.
AGE_MS = 10_000
OLD_MS, OLD_AGE_MS = 600_000, 60_000


@dataclass(frozen=True, slots=True)
class JobGroup:
    """Jobs of one tier, model and shape that came at about the same time.

    shape is None for jobs from before there was one; sample is a request of theirs. num_steps: of
    all. left: the mean share that is still to be done.
    """

    tier: str
    model: str
    shape: str | None
    sample: dict[str, Any] | None
    priority: int
    is_running: bool
    age_s: float
    num_jobs: int
    num_steps: int
    left: float = 1.0


def open_groups(connection: Connection) -> list[JobGroup]:
    """All that is queued or running."""
    return _groups(connection, jobs.c.state.in_(OPEN_STATES))


def arrived_groups(connection: Connection, from_s: float, until_s: float) -> list[JobGroup]:
    """All that came between so many seconds ago and so many, whatever has become of it."""
    came = jobs.c.created_at_ms
    # Asked once, or no index would do.
    now = select(now_ms()).scalar_subquery()
    since, until = now - int(from_s * 1000), now - int(until_s * 1000)
    return _groups(connection, and_(came >= since, came < until))


def _groups(connection: Connection, wanted: ColumnElement[bool]) -> list[JobGroup]:
    age_ms = cast(now_ms() - jobs.c.created_at_ms, BigInteger)
    coarse = case(
        (age_ms < OLD_MS, age_ms - age_ms % AGE_MS), else_=age_ms - age_ms % OLD_AGE_MS
    ).label("age_ms")
    running = case((jobs.c.state == JobState.RUNNING, 1), else_=0).label("running")
    like = (jobs.c.tier, jobs.c.model, jobs.c.shape, jobs.c.priority, running, coarse)
    counted: Select[Any] = (
        select(
            *like,
            func.count().label("num_jobs"),
            func.sum(jobs.c.num_steps).label("num_steps"),
            func.avg(cast(jobs.c.percentage, Float)).label("percentage"),
            func.min(jobs.c.number).label("number"),
        )
        .where(wanted)
        .group_by(*like)
    )
    rows = connection.execute(counted).all()
    return [
        JobGroup(
            tier=row.tier,
            model=row.model,
            shape=row.shape,
            sample=None if row.shape is not None else _request(connection, row.number),
            priority=row.priority,
            is_running=bool(row.running),
            age_s=row.age_ms / 1000,
            num_jobs=row.num_jobs,
            num_steps=int(row.num_steps),
            left=1 - row.percentage / 100,
        )
        for row in rows
    ]


def _request(connection: Connection, number: int) -> dict[str, Any]:
    query = select(jobs.c.request).where(jobs.c.number == number)
    found: dict[str, Any] = connection.execute(query).scalar_one()
    return found
