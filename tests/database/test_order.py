"""The queue's order, in SQL as in words."""

import random
from collections.abc import Callable

from sqlalchemy import Engine, insert, update

from credits.accounts import Account
from jobs.job import Job
from jobs.order import Waiting, next_in_line
from jobs.store import lease
from jobs.tables import jobs, now_ms
from tests.database.conftest import lease_now

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]
AGEING_MS = 600_000


def put(engine: Engine, waiting: list[Waiting]) -> None:
    """Queue these, made so long ago, without their money."""
    with engine.begin() as connection:
        for job in waiting:
            connection.execute(
                insert(jobs).values(
                    number=job.number,
                    id=str(job.number),
                    account_id=job.account_id,
                    state="queued",
                    model="m",
                    tier="local",
                    priority=job.priority,
                    request={},
                    quoted=1,
                    quote_exact="1",
                    reservation_id=str(job.number),
                    created_at_ms=0,
                )
            )
            connection.execute(
                update(jobs)
                .where(jobs.c.number == job.number)
                .values(created_at_ms=now_ms() - job.waited_ms)
            )


def lease_all(engine: Engine) -> list[int]:
    numbers = []
    while (job := lease_now(engine)) is not None:
        numbers.append(job.number)
    return numbers


def expected(waiting: list[Waiting]) -> list[int]:
    """Leasing one at a time: what runs already counts for its account."""
    running: dict[str, int] = {}
    left, order = list(waiting), []
    while left:
        number = next_in_line(left, running, AGEING_MS)[0]
        job = next(job for job in left if job.number == number)
        running[job.account_id] = running.get(job.account_id, 0) + 1
        left.remove(job)
        order.append(number)
    return order


def test_accounts_take_turns(engine: Engine) -> None:
    put(engine, [Waiting(1, "a", 1, 90), Waiting(2, "a", 1, 80), Waiting(3, "a", 1, 70)])
    put(engine, [Waiting(4, "b", 1, 60), Waiting(5, "c", 1, 50), Waiting(6, "b", 1, 40)])
    assert lease_all(engine) == [1, 4, 5, 2, 6, 3]


def test_a_higher_plan_goes_first_until_others_have_waited_too_long(engine: Engine) -> None:
    low_fresh, low_old = Waiting(1, "a", 1, 1000), Waiting(2, "b", 1, 2 * AGEING_MS + 5000)
    high = Waiting(3, "c", 2, 1000)
    put(engine, [low_fresh, low_old, high])
    assert lease_all(engine) == [2, 3, 1]


def test_only_plans_from_a_priority_on_are_leased_if_one_is_named(engine: Engine) -> None:
    put(engine, [Waiting(1, "a", 2, 10 * AGEING_MS), Waiting(2, "b", 3, 0), Waiting(3, "c", 4, 0)])
    with engine.begin() as connection:
        leased = [lease(connection, "me", ["local"], 60_000, min_priority=3) for _ in range(3)]
    assert [job and job.number for job in leased] == [3, 2, None]


def test_the_sql_keeps_to_the_order_in_words(engine: Engine) -> None:
    chance = random.Random(5)
    waiting = [
        Waiting(
            number,
            chance.choice("abcd"),
            chance.choice((1, 2, 3)),
            chance.randrange(4) * AGEING_MS + AGEING_MS // 2,
        )
        for number in range(1, 25)
    ]
    put(engine, waiting)
    assert lease_all(engine) == expected(waiting)
