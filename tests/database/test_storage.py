"""The plan's room for videos: promised at admission, exact afterwards, given back by deleting."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, update

from credits.accounts import Account, accounts
from credits.plans import Plan
from credits.pricing import WorkWeights
from deployments.settlement import Ending, WorkDone, settle
from jobs.job import Job, JobState
from jobs.store import stored_bytes
from media.object_store import LocalObjectStore
from tests.conftest import read_account
from tests.database.conftest import Door, job_now, lease_now

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
