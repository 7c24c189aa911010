"""Jobs: leased once, moved only by their holder, ended once."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, MetaData, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError

from credits.accounts import Account, accounts
from credits.accounts import metadata as credits_metadata
from deployments.database import migrate, open_database, reader, retry_while_away
from deployments.purge import Purger
from jobs.events import events_after
from jobs.job import Job, JobState, Outcome, Phase, Progress
from jobs.leases import extend_leases, lease, move
from jobs.retention import mark_deleted, mark_purged, purgeable
from jobs.store import (
    JobNotFound,
    LeaseLost,
    cancelled_of,
    finish,
    get_job,
    list_jobs,
    record,
    request_cancel,
)
from jobs.tables import jobs, metadata
from media.object_store import LocalObjectStore
from media.renditions import Rendition, rendition_key
from tests.conftest import read_account
from tests.database.conftest import job_now, lease_now

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]
SUCCESS = Outcome(JobState.SUCCEEDED, 1, 0, "done", video_key="videos/x")


def record_now(engine: Engine, job: Job, owner: str, percentage: int) -> None:
    with engine.begin() as connection:
        record(connection, job.id, owner, Progress(Phase.DENOISE, percentage, 1, 2))


def finish_now(engine: Engine, job: Job, owner: str | None, outcome: Outcome = SUCCESS) -> None:
    with engine.begin() as connection:
        finish(connection, job.id, lease_owner=owner, outcome=outcome)


def let_leases_expire(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            update(jobs).values(lease_expires_at_ms=0).where(jobs.c.lease_owner.is_not(None))
        )


def test_the_migrations_make_the_tables_that_the_code_uses(engine: Engine) -> None:
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        both = cast(MetaData, [credits_metadata, metadata])  # Alembic takes several, its types not
        assert compare_metadata(context, both) == []


def test_only_known_databases_are_opened() -> None:
    with pytest.raises(ValueError, match="oracle"):
        open_database("oracle://x")


def test_a_job_is_leased_once_by_priority_then_age(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    first, second, third = (a_job(account) for _ in range(3))
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == third.id).values(priority=9))
    leased = [lease_now(engine) for _ in range(4)]
    assert [job.id if job else None for job in leased] == [third.id, first.id, second.id, None]
    assert all(job.state is JobState.RUNNING and job.attempt == 1 for job in leased if job)


def test_other_tiers_jobs_stay(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    a_job(an_account())
    with engine.begin() as connection:
        assert lease(connection, "me", ["a100"], 1000) is None


def test_many_workers_never_lease_the_same_job(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    accounts = [an_account(f"a{index}") for index in range(5)]
    expected = {a_job(account).id for account in accounts for _ in range(4)}
    leased: list[str] = []

    def work(owner: str) -> None:
        while (job := lease_now(engine, owner)) is not None:
            leased.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(leased) == sorted(expected)


def test_an_expired_lease_passes_to_another_and_the_first_holder_can_do_nothing(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine, "first")
    assert lease_now(engine, "second") is None
    let_leases_expire(engine)
    taken = lease_now(engine, "second")
    assert taken is not None
    assert taken.attempt == 2
    with pytest.raises(LeaseLost):
        record_now(engine, job, "first", 10)
    with pytest.raises(LeaseLost):
        finish_now(engine, job, "first")
    with engine.begin() as connection:
        assert extend_leases(connection, "first", {job.id}, 1000) == set()
    finish_now(engine, job, "second")


def test_a_heartbeat_keeps_only_the_leases_it_names(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    kept, given_up = (a_job(an_account(name)) for name in ("alice", "bob"))
    for _ in range(2):
        lease_now(engine, "me", lease_ms=60_000)
    let_leases_expire(engine)
    with engine.begin() as connection:
        assert extend_leases(connection, "me", {kept.id}, 60_000) == {kept.id}
    taken = lease_now(engine, "other")
    assert taken is not None
    assert taken.id == given_up.id
    assert lease_now(engine, "other") is None


def test_progress_never_goes_back(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    job = a_job(an_account())
    lease_now(engine)
    for percentage in (10, 50, 2, 60):
        record_now(engine, job, "me", percentage)
    with reader(engine).begin() as connection:
        events = events_after(connection, job.id, 0)
    assert [event.seq for event in events] == [1, 2, 3, 4, 5]
    assert [event.progress.percentage for event in events] == [0, 10, 50, 50, 60]
    assert job_now(engine, job).percentage == 60


def test_events_replay_from_any_seq(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    job = a_job(an_account())
    lease_now(engine)
    record_now(engine, job, "me", 10)
    finish_now(engine, job, "me")
    with reader(engine).begin() as connection:
        assert [event.seq for event in events_after(connection, job.id, 1)] == [2, 3]
        last = events_after(connection, job.id, 2)[0]
    assert last.state is JobState.SUCCEEDED
    assert last.progress.percentage == 100


def test_a_finished_job_stays_finished(engine: Engine, an_account: AnAccount, a_job: AJob) -> None:
    job = a_job(an_account())
    lease_now(engine)
    finish_now(engine, job, "me")
    for owner in ("me", None):
        with pytest.raises(LeaseLost):
            finish_now(engine, job, owner, Outcome(JobState.FAILED, 0, 1, "late"))
    assert lease_now(engine) is None
    assert job_now(engine, job).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    "change",
    [
        "state = 'lost'",
        "state = 'succeeded'",
        "charged = 1",
        "state = 'running'",
        "lease_owner = 'me'",
    ],
)
def test_the_database_refuses_an_impossible_job(
    engine: Engine, an_account: AnAccount, a_job: AJob, change: str
) -> None:
    a_job(an_account())
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(text(f"UPDATE jobs SET {change}"))


def test_a_cancellation_reaches_the_holder(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine)
    with engine.begin() as connection:
        assert cancelled_of(connection, "me") == []
        request_cancel(connection, job.id)
        assert cancelled_of(connection, "me") == [job.id]
        assert cancelled_of(connection, "other") == []


def test_a_list_is_stable_while_jobs_are_added(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    old = [a_job(account) for _ in range(3)]
    with reader(engine).begin() as connection:
        page = list_jobs(connection, account.id, after=None, limit=2, ascending=False)
    a_job(account)
    with reader(engine).begin() as connection:
        rest = list_jobs(connection, account.id, after=page[-1].id, limit=9, ascending=False)
        oldest = list_jobs(connection, account.id, after=old[0].id, limit=1, ascending=True)
    assert [job.id for job in page + rest] == [job.id for job in reversed(old)]
    assert oldest[0].id == old[1].id


def test_a_deleted_job_is_gone_and_its_files_are_listed_until_purged(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    job = a_job(account)
    with engine.begin() as connection:
        mark_deleted(connection, job.id)
    assert job_now(engine, job).state is JobState.QUEUED
    lease_now(engine)
    finish_now(engine, job, "me")
    with engine.begin() as connection:
        mark_deleted(connection, job.id)
        assert [purged.id for purged in purgeable(connection)] == [job.id]
        mark_purged(connection, job.id)
        assert purgeable(connection) == []
        assert list_jobs(connection, account.id, after=None, limit=9, ascending=True) == []
        with pytest.raises(JobNotFound):
            get_job(connection, job.id, account.id)


def test_readers_do_not_wait_for_a_writer(engine: Engine, an_account: AnAccount) -> None:
    account = an_account()
    with engine.begin() as writer:
        writer.execute(text("UPDATE accounts SET name = 'x'"))
        assert read_account(engine, account.id).name == "alice"


def test_a_database_is_one_file_in_its_folder(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'new' / 'test.db'}")
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
    assert (tmp_path / "new" / "test.db").is_file()
    engine.dispose()


@pytest.mark.parametrize("name", ["inputs/{}", "inputs/{}.source", "checkpoints/{}.safetensors"])
def test_what_a_kill_left_behind_is_deleted_when_seen_twice(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob, name: str
) -> None:
    open_job = a_job(an_account())
    purger = Purger(engine, store)
    for job_id in (open_job.id, "video_orphan"):
        store.put(name.format(job_id), b"content")
    purger.purge_orphans()
    assert len(list(store.list(""))) == 2
    purger.purge_orphans()
    assert [info.key for info in store.list("")] == [name.format(open_job.id)]


def test_a_file_that_cannot_be_deleted_is_left_for_later(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine)
    finish_now(engine, job, "me")
    with engine.begin() as connection:
        mark_deleted(connection, job.id)
    obstacle = store.path(rendition_key(job.id, Rendition.VIDEO))
    obstacle.mkdir(parents=True)
    purger = Purger(engine, store)
    purger.purge_videos()
    with engine.begin() as connection:
        assert len(purgeable(connection)) == 1
    obstacle.rmdir()
    store.put(rendition_key(job.id, Rendition.VIDEO), b"video")
    purger.purge_videos()
    with engine.begin() as connection:
        assert purgeable(connection) == []
    assert not obstacle.exists()


def test_a_holder_does_not_lease_its_own_job_again(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine, "me")
    let_leases_expire(engine)
    with engine.begin() as connection:
        assert lease(connection, "me", ["local"], 1000, {job.id}) is None
    assert lease_now(engine, "other") is not None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_the_pipeline_writes_outlives_a_connection(engine: Engine, alice: Account) -> None:
    ended: list[int] = []

    def act() -> str:
        with engine.begin() as connection:
            if not ended:  # as a fail-over of the database does
                pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
                with engine.begin() as other:
                    other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
                ended.append(pid)
            return str(connection.execute(select(accounts.c.name)).scalar_one())

    assert asyncio.run(retry_while_away(act, for_s=30.0)) == "alice"
    assert len(ended) == 1
    ended.clear()
    with pytest.raises(OperationalError):
        asyncio.run(retry_while_away(act, for_s=-1.0))


def test_a_job_is_moved_to_another_tier_by_its_holder_alone(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine)
    with engine.begin() as connection, pytest.raises(LeaseLost):
        move(connection, job.id, "another", "a100")
    with engine.begin() as connection:
        move(connection, job.id, "me", "a100")
        assert lease(connection, "me", ["local"], 1000) is None
        moved = lease(connection, "next", ["a100"], 1000)
    assert moved is not None
    assert (moved.id, moved.attempt, moved.reservation_id) == (job.id, 2, job.reservation_id)
    with engine.begin() as connection, pytest.raises(LeaseLost):
        move(connection, job.id, "me", "local")
