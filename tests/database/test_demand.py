"""What the job table says of work, on both databases, and how long stages took."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, update

from autoscaling.demand import Horizon, measure_demand
from autoscaling.stage_costs import StageCosts, TierGpus
from autoscaling.tiers import GpuTier
from autoscaling.traces import read_trace
from autoscaling.urgency import UrgencyConfig
from bench.export_trace import export_trace
from credits.accounts import Account
from credits.plans import Plan
from deployments.database import reader
from jobs.demand import JobGroup, arrived_groups, open_groups
from jobs.job import Job, Phase, Progress
from jobs.leases import lease, lease_for
from jobs.stage_times import KEPT_MS, TimedStage, note_times, read_times
from jobs.store import record, request_cancel
from jobs.tables import jobs, now_ms, stage_times
from models.catalog import Model
from models.cost import VideoShape
from models.request import VideoRequest
from tests.database.conftest import end_next_job

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]
LOCAL = TierGpus(GpuTier.LOCAL)


def read_open(engine: Engine) -> list[JobGroup]:
    with reader(engine).begin() as connection:
        return open_groups(connection)


def set_of(engine: Engine, job: Job, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))


def test_like_jobs_are_counted_together(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    assert read_open(engine) == []
    account = an_account()
    first, *_ = [a_job(account) for _ in range(3)]
    a_job(account, num_frames=9)
    groups = sorted(read_open(engine), key=lambda group: group.num_jobs)
    assert [group.num_jobs for group in groups] == [1, 3]
    request = VideoRequest.model_validate(first.request)
    assert groups[1] == JobGroup(
        tier="local",
        model=first.model,
        shape=str(VideoShape.of(request)),
        sample=None,
        priority=first.priority,
        is_running=False,
        age_s=0.0,
        num_jobs=3,
        num_steps=3 * request.num_steps,
    )


def test_what_is_done_of_those_that_run_does_not_count(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    for _ in range(2):
        a_job(account)
    with engine.begin() as connection:
        job = lease(connection, "me", ["local"], 60_000)
        assert job is not None
        record(connection, job.id, "me", Progress(Phase.DENOISE, 60, 3, 5))
    queued, running = sorted(read_open(engine), key=lambda group: group.is_running)
    assert (queued.is_running, queued.left) == (False, 1.0)
    assert running.is_running
    assert running.left == pytest.approx(0.4)


def test_ended_jobs_are_no_work_but_have_come(
    engine: Engine, an_account: AnAccount, a_job: AJob, store: Any
) -> None:
    account = an_account()
    old, new = a_job(account), a_job(account)
    end_next_job(engine, store)
    with engine.begin() as connection:
        request_cancel(connection, new.id)
    set_of(engine, old, created_at_ms=now_ms() - 1_830_000)
    assert sum(group.num_jobs for group in read_open(engine)) == 1
    with reader(engine).begin() as connection:
        hour = arrived_groups(connection, 3600, 0)
        recent = arrived_groups(connection, 600, 0)
        before = arrived_groups(connection, 3600, 600)
    assert sorted(group.age_s for group in hour) == [0.0, 1800.0]  # whole minutes, long ago
    assert [group.num_jobs for group in recent] == [1]
    assert [group.age_s for group in before] == [1800.0]


def test_jobs_from_before_there_was_a_shape_are_counted_by_their_requests(
    engine: Engine, an_account: AnAccount, a_job: AJob, model: Model
) -> None:
    job = a_job(an_account())
    horizon = Horizon(0.0, 600.0, 0)
    costs = StageCosts({job.model: model})

    def demanded() -> float:
        groups = read_open(engine)
        return measure_demand(LOCAL, groups, [], [], costs, UrgencyConfig(), horizon).queued_s

    expected = demanded()
    assert expected > 0
    set_of(engine, job, shape=None, num_steps=0)
    (group,) = read_open(engine)
    assert group.sample == job.request
    assert demanded() == pytest.approx(expected)


def test_stage_times_follow_what_is_shorter_at_once_and_what_is_longer_slowly(
    engine: Engine,
) -> None:
    stage = TimedStage("m", "s", "a100", Phase.DENOISE, 4)
    other = TimedStage("m", "s", "a100", Phase.DECODE)

    def known() -> dict[TimedStage, float]:
        with reader(engine).begin() as connection:
            return read_times(connection)

    def note(*took_s: tuple[TimedStage, float]) -> None:
        with engine.begin() as connection:
            note_times(connection, took_s)

    note((stage, 2.0), (other, 10.0))
    assert known() == {stage: 2.0, other: 10.0}
    note((stage, 1.0))
    assert known()[stage] == pytest.approx(1.5)
    note((stage, 3.5))
    assert known()[stage] == pytest.approx(1.6)
    assert known()[other] == 10.0
    with engine.begin() as connection:
        old_ms = now_ms() - KEPT_MS - 1000
        is_other = stage_times.c.stage == Phase.DECODE
        connection.execute(update(stage_times).where(is_other).values(measured_at_ms=old_ms))
    note((stage, 1.6))
    assert set(known()) == {stage}


def test_a_tier_takes_jobs_that_have_waited_for_another(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    first = a_job(an_account())
    options: dict[str, Any] = {"of_tiers": ["local"], "lease_ms": 60_000}

    def take(models: list[str], min_wait_ms: int) -> Job | None:
        with engine.begin() as connection:
            return lease_for(
                connection, "me", "a100", models=models, min_wait_ms=min_wait_ms, **options
            )

    assert take([first.model], 60_000) is None
    set_of(engine, first, created_at_ms=now_ms() - 61_000)
    assert take(["another"], 60_000) is None
    taken = take([first.model], 60_000)
    assert taken is not None
    assert (taken.id, taken.tier, taken.attempt) == (first.id, "a100", 1)
    assert take([first.model], 60_000) is None


def test_the_job_table_can_be_replayed(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    alice, bob = an_account("alice"), an_account("bob", plan=Plan.PRO)
    first, second = a_job(alice), a_job(bob, num_frames=9)
    set_of(engine, first, created_at_ms=now_ms() - 90_000)
    with reader(engine).begin() as connection:
        lines = list(export_trace(connection))
    one, other = read_trace(lines)
    assert (one.arrived_s, one.plan, one.account) == (0.0, Plan.ENTERPRISE, 0)
    assert other.arrived_s == pytest.approx(90.0, abs=5.0)
    assert (other.plan, other.account, other.kind.num_frames) == (Plan.PRO, 1, 9)
    assert one.kind.num_steps == first.request["num_steps"]
    assert "prompt" not in "".join(lines)
    assert second.request["prompt"] not in "".join(lines)
