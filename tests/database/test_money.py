"""Any interleaving of admitting, leasing, crashing, settling, cancelling and expiring conserves
money and leaves every job in exactly one state; and the check can tell when it does not.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from bench.databases import fresh_database, fresh_sqlite
from bench.money_simulation import simulate
from bench.money_world import BREAKABLE, MAX_JOBS, NUM_ACCOUNTS, OWNERS, World
from jobs.job import JobState
from models.catalog import Model

ACCOUNT = st.integers(0, NUM_ACCOUNTS - 1)
OWNER = st.integers(0, len(OWNERS) - 1)
JOB = st.integers(0, 20)
CRASH_AT = st.one_of(st.none(), st.integers(1, 9))
ENDS = st.sampled_from([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])

Fresh = Callable[[], AbstractContextManager[str]]


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest) -> Fresh:
    """Makes one empty database after the other."""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql_url")
        template = request.getfixturevalue("postgresql_template")
        return lambda: fresh_database(server, template)
    return fresh_sqlite


class MoneyMachine(RuleBasedStateMachine):
    """Hypothesis makes an instance, with a database of its own, for each history."""

    fresh: Fresh
    model: Model

    def __init__(self) -> None:
        super().__init__()
        self.database = type(self).fresh()
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(self.database.__enter__(), Path(self.folder.name), self.model)

    def teardown(self) -> None:
        self.world.close()
        self.database.__exit__(None, None, None)
        self.folder.cleanup()

    def do(self, crash_at: int | None, act: Callable[[], Any]) -> None:
        with self.world.crashing(crash_at):
            act()

    def has_jobs(self) -> bool:
        return self.world.num_jobs() > 0

    @rule(account=ACCOUNT, amount=st.integers(1, 200), crash_at=CRASH_AT)
    def grant(self, account: int, amount: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.grant(account, amount))

    @rule(
        account=ACCOUNT,
        num_frames=st.sampled_from([5, 13, 29]),
        key=st.one_of(st.none(), st.sampled_from(["a", "b"])),
        crash_at=CRASH_AT,
    )
    def admit(self, account: int, num_frames: int, key: str | None, crash_at: int | None) -> None:
        frames = num_frames if key is None else 13
        self.do(crash_at, lambda: self.world.admit(account, frames, key))

    @rule(owner=OWNER, crash_at=CRASH_AT)
    def lease(self, owner: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.lease(owner))

    @precondition(has_jobs)
    @rule(owner=OWNER, job=JOB, step=st.integers(0, 99), crash_at=CRASH_AT)
    def progress(self, owner: int, job: int, step: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.progress(owner, job, step))

    @precondition(has_jobs)
    @rule(owner=OWNER, job=JOB, steps=st.integers(0, 30), state=ENDS, crash_at=CRASH_AT)
    def finish(
        self, owner: int, job: int, steps: int, state: JobState, crash_at: int | None
    ) -> None:
        self.do(crash_at, lambda: self.world.finish(owner, job, steps, state))

    @precondition(has_jobs)
    @rule(job=JOB, crash_at=CRASH_AT)
    def cancel(self, job: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.cancel(job))

    @rule(account=ACCOUNT, num_frames=st.sampled_from([5, 13]), crash_at=CRASH_AT)
    def retry(self, account: int, num_frames: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.retry(account, num_frames))

    @precondition(has_jobs)
    @rule(job=JOB, crash_at=CRASH_AT)
    def delete(self, job: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.delete(job))

    @rule(account=ACCOUNT, disabled=st.booleans(), crash_at=CRASH_AT)
    def disable(self, account: int, disabled: bool, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.disable(account, disabled))

    @rule(owner=OWNER)
    def hang(self, owner: int) -> None:
        self.world.let_leases_run_out(owner)

    @precondition(has_jobs)
    @rule(job=JOB, crash_at=CRASH_AT)
    def expire(self, job: int, crash_at: int | None) -> None:
        self.do(crash_at, lambda: self.world.expire(job))

    @invariant()
    def every_law_holds(self) -> None:
        assert self.world.violations() == []


def test_any_history_conserves_money(fresh: Fresh, model: Model) -> None:
    parts = {"fresh": staticmethod(fresh), "model": model}
    run_machine(
        type("MoneyMachine", (MoneyMachine,), parts),
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_long_history_with_crashes_conserves_money(fresh: Fresh, model: Model) -> None:
    with fresh() as url:
        steps, violations = simulate(url, model, seed=2, num_steps=300, broken=None)
    assert violations == []
    assert min(steps.values()) >= 5
    assert MAX_JOBS < sum(steps.values()) == 300


@pytest.mark.parametrize("law", BREAKABLE)
def test_a_law_that_is_switched_off_is_missed(fresh: Fresh, model: Model, law: str) -> None:
    for seed in (1, 2, 3):  # histories in which it matters are not all
        with fresh() as url:
            steps, violations = simulate(url, model, seed=seed, num_steps=400, broken=law)
        if violations:
            break
    assert violations
    assert sum(steps.values()) < 400
