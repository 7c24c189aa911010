"""Jobs that nobody finishes end once, and all their credits come back."""

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, update

from credits.accounts import Account
from credits.pricing import WorkWeights
from deployments.config import LeaseConfig
from deployments.database import migrate, open_database
from deployments.expiry import expire_jobs
from jobs.job import Job, JobState
from jobs.tables import jobs
from media.object_store import LocalObjectStore
from tests.conftest import read_account
from tests.database.conftest import job_now, lease_now

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]
HOUR = LeaseConfig(max_age_s=3600)


def expire(engine: Engine, store: LocalObjectStore) -> int:
    return expire_jobs(engine, store, WorkWeights(), HOUR, "sweeper")


def make_old(engine: Engine, job: Job) -> None:
    """Two hours pass, and with them the job's lease."""
    with engine.begin() as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job.id)
            .values(created_at_ms=jobs.c.created_at_ms - 7_200_000, lease_expires_at_ms=1)
        )


@pytest.mark.parametrize("leased", [False, True])
def test_an_overdue_job_is_refunded_once_by_many_sweepers(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob, leased: bool
) -> None:
    old, young = a_job(alice), a_job(alice)
    if leased:
        assert lease_now(engine) == job_now(engine, old)
    make_old(engine, old)
    ended: list[int] = []
    sweepers = [
        threading.Thread(target=lambda: ended.append(expire(engine, store))) for _ in range(4)
    ]
    for sweeper in sweepers:
        sweeper.start()
    for sweeper in sweepers:
        sweeper.join()
    assert sorted(ended) == [0, 0, 0, 1]
    now = job_now(engine, old)
    assert (now.state, now.error_code, now.charged, now.refunded) == ("failed", "expired", 0, 26)
    assert job_now(engine, young).state is JobState.QUEUED
    account = read_account(engine, alice.id)
    assert (account.available, account.reserved, account.open_reservations) == (974, 26, 1)


def test_files_that_cannot_be_deleted_keep_no_job_from_expiring(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bad, good = a_job(alice), a_job(alice)
    for job in (bad, good):
        make_old(engine, job)
    delete = LocalObjectStore.delete

    def fail_once(self: LocalObjectStore, key: str) -> None:
        if bad.id in key:
            raise OSError("disk")
        delete(self, key)

    monkeypatch.setattr(LocalObjectStore, "delete", fail_once)
    assert expire(engine, store) == 2
    assert job_now(engine, good).error_code == job_now(engine, bad).error_code == "expired"
    assert read_account(engine, "alice").reserved == 0


def test_a_job_that_somebody_works_on_never_expires(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob
) -> None:
    job = a_job(alice)
    make_old(engine, job)
    lease_now(engine)
    assert expire(engine, store) == 0
    assert job_now(engine, job).state is JobState.RUNNING


def test_a_sweeper_killed_after_its_lease_leaves_the_job_to_the_next(
    database_url: str, engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob
) -> None:
    job = a_job(alice)
    make_old(engine, job)
    killed = lease_now(engine, "killed sweeper")
    assert killed is not None
    make_old(engine, job)
    again = open_database(database_url)
    migrate(again)
    assert expire(again, store) == 1
    again.dispose()
    assert job_now(engine, job).state is JobState.FAILED
