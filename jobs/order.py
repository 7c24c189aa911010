"""The queue's order: plan, then the accounts in turn, then age; nothing starves.

Accounts take turns as flows do in start-time fair queueing (Goyal, Vin and Cheng, 1996): a job's
turn is the one after its account's last open job on its tier, but not before the first turn that
is still open there, and stays as it is. So indexes have the order, and nobody ranks all that wait.
`next_in_line` and `next_turn` say it in Python, and are what the tests hold the SQL to.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import (
    CTE,
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

from jobs.job import OPEN_STATES, JobState
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
    turn comes first, then whoever has waited longest.
    """
    ranked = sorted(
        waiting,
        key=lambda job: (
            -job.priority - job.waited_ms // ageing_ms,
            job.turn,
            -job.waited_ms,
            job.number,
        ),
    )
    return [job.number for job in ranked]


def next_turn(of_account: Collection[int], of_tier: Collection[int]) -> int:
    """A new job's, of the turns of its account's open jobs on the tier and of all that it has."""
    return max(max(of_account, default=0) + 1, min(of_tier, default=1))


def turn_of(account_id: ColumnElement[str], tier: ColumnElement[str]) -> ColumnElement[int]:
    """The same, of a job that comes to a tier."""
    others = jobs.alias("others")
    of_tier = and_(others.c.tier == tier, others.c.state.in_(OPEN_STATES))
    last = select(func.coalesce(func.max(others.c.turn), 0)).where(
        of_tier, others.c.account_id == account_id
    )

    def first(state: JobState) -> ColumnElement[int]:
        found = jobs.alias(f"first_{state}")
        return _one(
            select(func.min(found.c.turn)).where(found.c.state == state, found.c.tier == tier)
        )

    queued, running = first(JobState.QUEUED), first(JobState.RUNNING)
    least = func.coalesce(case((queued < running, queued), else_=func.coalesce(running, queued)), 1)
    after = _one(last) + 1
    return case((after > least, after), else_=least)


def first_in_line(
    of_tiers: ColumnElement[bool],
    min_priority: ColumnElement[int],
    ageing_ms: ColumnElement[int],
    abandoned: ColumnElement[bool],
) -> Select[tuple[int]]:
    """The number of the job that is to be leased next, locked; no other transaction is at it.

    of_tiers: what is asked of queued and running jobs. abandoned: of a running one, whether its
    holder is gone; such a one goes before any that waits.
    """
    queued = and_(jobs.c.state == JobState.QUEUED, of_tiers, jobs.c.priority >= min_priority)
    running = and_(jobs.c.state == JobState.RUNNING, of_tiers, jobs.c.priority >= min_priority)
    lowest = _lowest_turns(queued, _levels(queued, ageing_ms))
    best = _locked(
        select(jobs.c.number)
        .where(
            queued,
            jobs.c.priority == lowest.c.priority,
            jobs.c.turn == lowest.c.turn,
            jobs.c.created_at_ms <= lowest.c.came_by_ms,
        )
        .order_by(jobs.c.created_at_ms, jobs.c.number)
        .correlate(lowest)
    )
    left_alone = _locked(
        select(jobs.c.number)
        .where(running, abandoned)
        .order_by(jobs.c.turn, jobs.c.created_at_ms)
        .correlate(None)
    )
    found = union_all(
        select(left_alone.label("number"), literal(1).label("is_left"), literal(0).label("level")),
        # of every priority, so that one that is locked hides no other
        select(best, literal(0), lowest.c.level),
    ).cte("found")
    candidate = jobs.alias("candidate")
    return (
        select(candidate.c.number)
        .join(found, found.c.number == candidate.c.number)
        .order_by(
            found.c.is_left.desc(),
            found.c.level.desc(),
            candidate.c.turn,
            candidate.c.created_at_ms,
            candidate.c.number,
        )
        .limit(1)
    )


def _levels(queued: ColumnElement[bool], ageing_ms: ColumnElement[int]) -> CTE:
    """Every priority that somebody waits with, the level of its oldest job, and came_by_ms: whoever
    came by then is of that level, too. A step through an index for each.
    """
    least = select(func.min(jobs.c.priority).label("priority")).where(queued)
    priorities = least.cte("priorities", recursive=True)
    above = select(func.min(jobs.c.priority)).where(queued, jobs.c.priority > priorities.c.priority)
    priorities = priorities.union_all(
        select(_one(above.correlate(priorities))).where(priorities.c.priority.is_not(None))
    )
    oldest = select(func.min(jobs.c.created_at_ms)).where(
        queued, jobs.c.priority == priorities.c.priority
    )
    waits = (
        select(
            priorities.c.priority,
            _one(oldest.correlate(priorities)).label("oldest_ms"),
            now_ms().label("now_ms"),
        )
        .where(priorities.c.priority.is_not(None))
        .cte("waits")
    )
    waited_ms = cast(waits.c.now_ms - waits.c.oldest_ms, BigInteger)
    return select(
        waits.c.priority,
        (waits.c.priority + waited_ms // ageing_ms).label("level"),
        (waits.c.oldest_ms + waited_ms % ageing_ms).label("came_by_ms"),
    ).cte("levels")


def _lowest_turns(queued: ColumnElement[bool], levels: CTE) -> CTE:
    """The lowest turn of each of these levels, found from one turn to the next: none is somebody's
    of the level if its oldest job came later.
    """
    kept = (levels.c.priority, levels.c.level, levels.c.came_by_ms)
    first = select(func.min(jobs.c.turn)).where(queued, jobs.c.priority == levels.c.priority)
    turns = select(*kept, _one(first.correlate(levels)).label("turn")).cte("turns", recursive=True)
    same = and_(queued, jobs.c.priority == turns.c.priority)
    following = select(func.min(jobs.c.turn)).where(same, jobs.c.turn > turns.c.turn)
    oldest = select(func.min(jobs.c.created_at_ms)).where(same, jobs.c.turn == turns.c.turn)
    kept = (turns.c.priority, turns.c.level, turns.c.came_by_ms)
    turns = turns.union_all(
        select(*kept, _one(following.correlate(turns))).where(
            turns.c.turn.is_not(None), _one(oldest.correlate(turns)) > turns.c.came_by_ms
        )
    )
    kept = (turns.c.priority, turns.c.level, turns.c.came_by_ms)
    return select(*kept, func.max(turns.c.turn).label("turn")).group_by(*kept).cte("lowest")


def _locked(query: Select[tuple[int]]) -> ScalarSelect[int]:
    """The first that no other transaction is at."""
    return _one(query.limit(1).with_for_update(skip_locked=True))


def _one(query: Select[tuple[int]]) -> ScalarSelect[int]:
    return query.scalar_subquery()
