"""The queue's order: plan, then round robin over accounts, then age; nothing starves.

`next_in_line` says it in Python and is what the tests hold the SQL of `rank_free_jobs` to.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import BigInteger, ColumnElement, Subquery, cast, func, select

from jobs.job import JobState
from jobs.tables import jobs, now_ms


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that could be leased; number grows with age, the lowest is the oldest."""

    number: int
    account_id: str
    priority: int
    waited_ms: int


def next_in_line(
    waiting: Iterable[Waiting], num_running: Mapping[str, int], ageing_ms: int
) -> list[int]:
    """The numbers of the waiting jobs, first come first.

    A job counts as one plan higher for every ageing_ms that it has waited. Among equals, the
    account that has fewer jobs running or before this one in the queue comes first, then age.
    """
    turns = Counter(num_running)
    keys = {}
    for job in sorted(waiting, key=lambda job: job.number):
        turns[job.account_id] += 1
        level = job.priority + job.waited_ms // ageing_ms
        keys[job.number] = (-level, turns[job.account_id], job.number)
    return sorted(keys, key=lambda number: keys[number])


def rank_free_jobs(free: ColumnElement[bool], ageing_ms: int) -> Subquery:
    """The same order as columns level (descending), turn and number over the jobs that are free."""
    held = jobs.alias("held")
    num_running = (
        select(func.count())
        .where(
            held.c.account_id == jobs.c.account_id,
            held.c.state == JobState.RUNNING,
            held.c.lease_expires_at_ms >= now_ms(),
        )
        .correlate(jobs)
        .scalar_subquery()
    )
    place = func.row_number().over(partition_by=jobs.c.account_id, order_by=jobs.c.number)
    waited = cast(now_ms() - jobs.c.created_at_ms, BigInteger)
    return (
        select(
            jobs.c.number,
            (jobs.c.priority + waited // ageing_ms).label("level"),
            (num_running + place).label("turn"),
        )
        .where(free)
        .subquery("ranked")
    )
