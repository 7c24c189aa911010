"""The queue's order, in SQL as in words."""

import random
from collections.abc import Callable

from sqlalchemy import Engine, insert, update

from credits.accounts import Account
from jobs.job import Job
from jobs.leases import lease, move
from jobs.order import Waiting, next_in_line, next_turn
from jobs.store import get_job
from jobs.tables import jobs, now_ms
from media.object_store import LocalObjectStore
from tests.database.conftest import end_next_job, lease_now

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
                    account_id="any",
                    state="queued",
                    model="m",
                    tier="local",
                    priority=job.priority,
                    request={},
                    quoted=1,
                    quote_exact="1",
                    reservation_id=str(job.number),
                    created_at_ms=0,
                    turn=job.turn,
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


def test_accounts_take_turns(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    a, b, c = (an_account(name) for name in "abc")
    made = [a_job(account) for account in (a, a, a, b, c, b)]
    assert [job.turn for job in made] == [1, 2, 3, 1, 1, 2]
    numbers = [job.number for job in made]
    assert lease_all(engine) == [numbers[index] for index in (0, 3, 4, 1, 5, 2)]


def test_who_comes_new_does_not_wait_for_those_who_came_often(
    engine: Engine, an_account: AnAccount, a_job: AJob, store: LocalObjectStore
) -> None:
    """Nor is it ahead of all that they ever asked for: turns go on where the open ones are."""
    a, b = an_account("a"), an_account("b")
    for _ in range(3):
        a_job(a)
    for _ in range(2):
        end_next_job(engine, store)
    assert a_job(b).turn == 3
    assert a_job(a).turn == 4
    assert a_job(b).turn == 4


def test_turns_are_given_in_sql_as_in_words(
    engine: Engine, an_account: AnAccount, a_job: AJob, store: LocalObjectStore
) -> None:
    chance = random.Random(6)
    accounts = [an_account(name, credits=100_000) for name in "abcd"]
    open_jobs: dict[int, Job] = {}
    for _ in range(60):
        if open_jobs and chance.random() < 0.4:
            del open_jobs[end_next_job(engine, store).number]
            continue
        account = chance.choice(accounts)
        of_account = [job.turn for job in open_jobs.values() if job.account_id == account.id]
        expected = next_turn(of_account, [job.turn for job in open_jobs.values()])
        if len(of_account) < 4:
            job = a_job(account)
            assert job.turn == expected
            open_jobs[job.number] = job


def test_a_higher_plan_goes_first_until_others_have_waited_too_long(engine: Engine) -> None:
    low_fresh, low_old = Waiting(1, 1, 1, 1000), Waiting(2, 1, 1, 2 * AGEING_MS + 5000)
    high = Waiting(3, 2, 1, 1000)
    put(engine, [low_fresh, low_old, high])
    assert lease_all(engine) == [2, 3, 1]


def test_only_plans_from_a_priority_on_are_leased_if_one_is_named(engine: Engine) -> None:
    put(engine, [Waiting(1, 2, 1, 10 * AGEING_MS), Waiting(2, 3, 1, 0), Waiting(3, 4, 1, 0)])
    with engine.begin() as connection:
        leased = [lease(connection, "me", ["local"], 60_000, min_priority=3) for _ in range(3)]
    assert [job and job.number for job in leased] == [3, 2, None]


def test_the_sql_keeps_to_the_order_in_words(engine: Engine) -> None:
    chance = random.Random(5)
    waiting = [
        Waiting(
            number,
            chance.choice((1, 2, 3)),
            chance.randrange(1, 6),
            chance.randrange(4) * AGEING_MS + AGEING_MS // 2,
        )
        for number in range(1, 25)
    ]
    put(engine, waiting)
    assert lease_all(engine) == next_in_line(waiting, AGEING_MS)


def test_a_job_whose_holder_is_gone_goes_first(engine: Engine) -> None:
    put(engine, [Waiting(1, 1, 9, 0), Waiting(2, 3, 1, 5 * AGEING_MS)])
    with engine.begin() as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.number == 1)
            .values(state="running", lease_owner="dead", lease_expires_at_ms=0)
        )
    assert lease_all(engine) == [1, 2]


def test_turns_are_of_a_tier_and_a_job_that_changes_it_gets_a_new_one(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    alice, bob = an_account("alice"), an_account("bob")
    first, second, other = a_job(alice), a_job(alice), a_job(bob)
    assert [job.turn for job in (first, second, other)] == [1, 2, 1]
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == first.id).values(turn=100, tier="a100"))
        connection.execute(update(jobs).where(jobs.c.id == second.id).values(turn=200))
    leased = lease_now(engine)
    assert leased is not None
    assert leased.id == other.id
    with engine.begin() as connection:
        move(connection, other.id, "me", "a100")
        assert get_job(connection, other.id).turn == 100  # the first that is open there
    assert a_job(bob).turn == 200
    assert a_job(alice).turn == 201  # what it has on the other tier does not count


def test_one_that_is_locked_hides_no_other(engine: Engine) -> None:
    put(engine, [Waiting(1, 3, 1, 0), Waiting(2, 1, 1, 0), Waiting(3, 1, 1, 0)])
    with engine.begin() as one:
        first = lease(one, "one", ["local"], 60_000)
        assert first is not None
        assert first.number == 1
        if engine.dialect.name == "postgresql":
            with engine.begin() as other:
                second = lease(other, "other", ["local"], 60_000)
            assert second is not None
            assert second.number == 3  # the one before it may be this one's, too
