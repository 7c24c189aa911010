"""The queue's order: plan, then the accounts in turn, then age; nothing starves.

Accounts take turns as flows do in start-time fair queueing (Goyal, Vin and Cheng, 1996): a job's
turn is the one after its account's last open job, but not before the first turn that is still
open, and stays as it is. So the order is in indexes, and the first in line of a million is found
as quickly as that of ten. `next_in_line` and `next_turn` say it in Python, and are what the tests
hold the SQL to.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    ScalarSelect,
    Select,
    and_,
    case,
    cast,
    func,
    literal,
    select,
    union_all,
)

from jobs.job import FINAL_STATES, JobState
from jobs.tables import jobs, now_ms


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that could be leased; number grows with age, the lowest is the oldest."""

    number: int
    priority: int
    turn: int
    waited_ms: int


def next_in_line(waiting: Iterable[Waiting], ageing_ms: int) -> list[int]:
    """The numbers of the waiting jobs, first come first.

    A job counts as one plan higher for every ageing_ms that it has waited. Among equals the lowest
    turn comes first, then age.
    """
    ranked = sorted(
        waiting,
        key=lambda job: (-job.priority - job.waited_ms // ageing_ms, job.turn, job.number),
    )
    return [job.number for job in ranked]


def next_turn(of_account: Collection[int], of_tier: Collection[int]) -> int:
    """A new job's, of the turns of its account's open jobs and those of all that its tier has."""
    return max(max(of_account, default=0) + 1, min(of_tier, default=1))


def turn_of(account_id: ColumnElement[str], tier: ColumnElement[str]) -> ColumnElement[int]:
    """The same, of a job that is being inserted."""
    last = select(func.coalesce(func.max(jobs.c.turn), 0)).where(
        jobs.c.account_id == account_id, jobs.c.state.not_in(FINAL_STATES)
    )

    def first(state: JobState) -> Select[tuple[int]]:
        return select(func.min(jobs.c.turn).label("turn")).where(
            jobs.c.state == state, jobs.c.tier == tier
        )

    firsts = union_all(first(JobState.QUEUED), first(JobState.RUNNING)).subquery("firsts")
    least = func.coalesce(select(func.min(firsts.c.turn)).scalar_subquery(), 1)
    after = last.correlate(None).scalar_subquery() + 1
    return case((after > least, after), else_=least)


def first_in_line(
    of_tiers: ColumnElement[bool],
    min_priority: int,
    ageing_ms: int,
    abandoned: ColumnElement[bool],
) -> Select[tuple[int]]:
    """The number of the job that is to be leased next, locked; no other transaction is at it.

    of_tiers: what is asked of jobs.c.tier. abandoned: of a running job, whether its holder is gone;
    such a one goes before any that waits.
    """
    queued = and_(jobs.c.state == JobState.QUEUED, of_tiers)
    now = _one(select(now_ms()))
    # Every priority that somebody waits with, one after the other: a step through the index each.
    least = select(func.min(jobs.c.priority).label("priority"))
    priorities = least.where(queued, jobs.c.priority >= min_priority).cte(
        "priorities", recursive=True
    )
    above = select(func.min(jobs.c.priority)).where(queued, jobs.c.priority > priorities.c.priority)
    priorities = priorities.union_all(
        select(above.correlate(priorities).scalar_subquery()).where(
            priorities.c.priority.is_not(None)
        )
    )
    oldest = _one(
        select(func.min(jobs.c.created_at_ms))
        .where(queued, jobs.c.priority == priorities.c.priority)
        .correlate(priorities)
    )
    waited_ms = cast(now - oldest, BigInteger)
    levels = (
        select(
            priorities.c.priority, (priorities.c.priority + waited_ms // ageing_ms).label("level")
        )
        .where(priorities.c.priority.is_not(None))
        .cte("levels")
    )
    best = (
        select(jobs.c.number)
        .where(
            queued,
            jobs.c.priority == levels.c.priority,
            # of that level: whoever came before a moment
            jobs.c.created_at_ms <= now - (levels.c.level - levels.c.priority) * ageing_ms,
        )
        .order_by(jobs.c.turn, jobs.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
        .correlate(levels)
    )
    top = select(func.max(levels.c.level)).correlate(None)
    left_alone = (
        select(jobs.c.number)
        .where(
            jobs.c.state == JobState.RUNNING, of_tiers, jobs.c.priority >= min_priority, abandoned
        )
        .order_by(jobs.c.turn, jobs.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
        .correlate(None)
    )
    found = union_all(
        select(_one(left_alone).label("number"), literal(0).label("rank")),
        select(_one(best), literal(1)).where(levels.c.level == _one(top)),
    ).cte("found")
    candidate = jobs.alias("candidate")
    return (
        select(candidate.c.number)
        .join(found, found.c.number == candidate.c.number)
        .order_by(found.c.rank, candidate.c.turn, candidate.c.number)
        .limit(1)
    )


def _one(query: Select[tuple[int]]) -> ScalarSelect[int]:
    return query.scalar_subquery()
