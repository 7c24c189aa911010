"""The plan's room for videos: promised at admission, exact afterwards, given back by deleting."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select, update

from credits.accounts import Account, accounts
from credits.plans import Plan
from credits.pricing import WorkWeights
from deployments.purge import Purger
from deployments.settlement import Ending, WorkDone, settle
from jobs.job import Job, JobState
from jobs.retention import expired_videos, keep_for, mark_deleted, purgeable
from jobs.store import stored_bytes
from jobs.tables import jobs, now_ms
from media.object_store import LocalObjectStore
from media.renditions import Rendition, rendition_key
from tests.conftest import ADMIN_KEY, read_account
from tests.database.conftest import Caller, Door, job_now, lease_now

AJob = Callable[..., Job]


def used(engine: Engine) -> int:
    """What the account shows, which must be what its jobs' rows say."""
    with engine.begin() as connection:
        by_jobs = stored_bytes(connection).get("alice", 0)
    assert read_account(engine, "alice").stored_bytes == by_jobs
    return by_jobs


def finish(engine: Engine, store: LocalObjectStore, job: Job, size_bytes: int) -> None:
    lease_now(engine)
    ending = Ending(
        JobState.SUCCEEDED, "done", charge_work=True, video_key="k", size_bytes=size_bytes
    )
    settle(engine, store, WorkWeights(), job, lease_owner="me", done=WorkDone(), ending=ending)


def test_an_estimate_is_promised_and_the_real_length_counts(
    engine: Engine, door: Door, alice: Account, a_job: AJob
) -> None:
    job = a_job(alice)
    assert used(engine) == job.estimated_bytes > 0
    finish(engine, door.store, job, 777)
    assert used(engine) == job_now(engine, job).size_bytes == 777
    for status in (200, 404):  # the second time there is nothing to give back
        assert door.as_account()("DELETE", f"/v1/videos/{job.id}").status_code == status
        assert used(engine) == 0
    cancelled = a_job(alice)
    assert used(engine) == cancelled.estimated_bytes
    door.as_account()("DELETE", f"/v1/videos/{cancelled.id}")
    assert used(engine) == 0


def test_a_full_account_is_507_before_concurrency_and_credits(
    engine: Engine, door: Door, alice: Account, a_job: AJob
) -> None:
    job = a_job(alice)
    limit = door.admission.plans.limits[Plan.ENTERPRISE].max_stored_bytes
    finish(engine, door.store, job, limit - 100)
    for _ in range(2):
        refused = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
    assert read_account(engine, "alice").reserved == 0
    assert door.as_account()("DELETE", f"/v1/videos/{job.id}").status_code == 200
    assert door.as_account()("POST", "/v1/videos", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("short_by", [0, 1])
def test_the_last_byte_may_be_used(
    engine: Engine, door: Door, alice: Account, a_job: AJob, short_by: int
) -> None:
    job = a_job(alice)
    limit = door.admission.plans.limits[Plan.ENTERPRISE].max_stored_bytes
    with engine.begin() as connection:
        taken = limit - job.estimated_bytes + short_by
        connection.execute(update(accounts).values(stored_bytes=taken))
    answer = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
    assert answer.status_code == (507 if short_by else 200)


DAY_MS = 86_400_000


@pytest.mark.parametrize(("plan", "days"), [(Plan.PRO, 30), (Plan.ENTERPRISE, None)])
def test_a_video_is_kept_for_as_long_as_the_plan_says(
    engine: Engine, door: Door, an_account: Callable[..., Account], a_job: AJob,
    plan: Plan, days: int | None,
) -> None:  # fmt: skip
    job = a_job(an_account("alice", plan=plan))
    call = door.as_account()
    assert call("GET", f"/v1/videos/{job.id}").json()["expires_at"] is None
    door.store.put(rendition_key(job.id, Rendition.VIDEO), b"video")
    finish(engine, door.store, job, 5)
    shown = call("GET", f"/v1/videos/{job.id}").json()
    kept = shown["expires_at"] and shown["expires_at"] - shown["completed_at"]
    assert kept == (None if days is None else days * DAY_MS // 1000)
    purger = Purger(engine, door.store)
    pass_time(engine, (days or 10_000) * DAY_MS - 60_000)
    purger.delete_expired()
    assert call("GET", f"/v1/videos/{job.id}").status_code == 200
    pass_time(engine, 61_000)
    purger.delete_expired()
    purger.delete_expired()
    purger.purge_videos()
    gone = days is not None
    assert call("GET", f"/v1/videos/{job.id}").status_code == (404 if gone else 200)
    assert used(engine) == (0 if gone else 5)
    assert len(list(door.store.list("videos/"))) == (0 if gone else 1)


def pass_time(engine: Engine, ms: int) -> None:
    with engine.begin() as connection:
        connection.execute(update(jobs).values(expires_at_ms=jobs.c.expires_at_ms - ms))


def test_with_another_plan_videos_are_kept_as_that_says_from_then_on(
    engine: Engine, door: Door, an_account: Callable[..., Account], a_job: AJob
) -> None:
    alice = an_account("alice", plan=Plan.PRO)
    made, queued, deleted = a_job(alice), a_job(alice), None
    finish(engine, door.store, made, 5)
    deleted = a_job(alice)
    door.as_account()("DELETE", f"/v1/videos/{deleted.id}")
    pass_time(engine, 29 * DAY_MS)
    admin = Caller(door.client, {"authorization": f"Bearer {ADMIN_KEY}"})
    for plan, days in (("enterprise", None), ("basic", 7), ("free", 7), ("pro", 30)):
        admin("PATCH", "/admin/v1/accounts/alice", json={"plan": plan})
        kept = None if days is None else days * DAY_MS
        with engine.begin() as connection:
            now = int(connection.execute(select(now_ms())).scalar_one())
        row = job_now(engine, made)
        assert job_now(engine, queued).kept_ms == row.kept_ms == kept
        if kept is None:
            assert row.expires_at_ms is None
        else:
            assert row.expires_at_ms is not None
            assert abs(row.expires_at_ms - now - kept) < 10_000
        assert job_now(engine, queued).expires_at_ms is None
        assert job_now(engine, deleted).expires_at_ms is None


def test_the_plan_that_an_account_has_already_changes_nothing(
    engine: Engine, door: Door, an_account: Callable[..., Account], a_job: AJob
) -> None:
    job = a_job(an_account("alice", plan=Plan.PRO))
    finish(engine, door.store, job, 5)
    pass_time(engine, DAY_MS)
    before = job_now(engine, job).expires_at_ms
    admin = Caller(door.client, {"authorization": f"Bearer {ADMIN_KEY}"})
    admin("PATCH", "/admin/v1/accounts/alice", json={"plan": "pro", "max_jobs": 5})
    assert job_now(engine, job).expires_at_ms == before


def test_a_video_that_is_to_be_kept_after_all_is_not_deleted(
    engine: Engine, door: Door, an_account: Callable[..., Account], a_job: AJob
) -> None:
    """Its account was upgraded between the sweep's look and its act."""
    job = a_job(an_account("alice", plan=Plan.PRO))
    finish(engine, door.store, job, 5)
    pass_time(engine, 31 * DAY_MS)
    with engine.begin() as connection:
        assert [found.id for found in expired_videos(connection)] == [job.id]
        keep_for(connection, "alice", None)
        assert mark_deleted(connection, job.id, only_expired=True) == 0
        assert mark_deleted(connection, job.id) == 5


# PostgreSQL's planner takes whatever is cheaper for as few rows as there are here.
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("find", [expired_videos, purgeable])
def test_a_sweep_reads_an_index_and_not_the_table(
    engine: Engine, alice: Account, find: Callable[[Connection], list[Job]]
) -> None:
    asked: list[tuple[str, Any]] = []

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    with engine.begin() as connection:
        event.listen(connection, "before_cursor_execute", record)
        find(connection)
        ((statement, parameters),) = asked
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert not any(row.detail.startswith("SCAN jobs") and "INDEX" not in row.detail for row in plan)
