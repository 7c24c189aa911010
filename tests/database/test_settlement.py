"""Settling and admission: money and job change together or not at all."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, update
from sqlalchemy.exc import OperationalError

from credits.accounts import Account
from credits.plans import TooManyJobs
from credits.pricing import WorkWeights
from deployments.checkpoints import checkpoint_key
from deployments.config import LeaseConfig
from deployments.expiry import expire_jobs
from deployments.idempotency import Attempt
from deployments.purge import Purger
from deployments.settlement import Ending, WorkDone, cancellation, settle, work_told
from jobs.job import Job, JobEvent, JobState, Outcome, Phase, Progress
from jobs.leases import move
from jobs.store import LeaseLost, record
from jobs.tables import jobs
from media.object_store import LocalObjectStore
from media.renditions import Rendition, rendition_key
from models.request import VideoRequest, read_stored
from tests.conftest import read_account
from tests.database.conftest import job_now, lease_now

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]


def settle_now(
    engine: Engine, store: LocalObjectStore, job: Job, done: WorkDone, ending: Ending
) -> Outcome:
    return settle(engine, store, WorkWeights(), job, lease_owner="me", done=done, ending=ending)


def test_a_cancelled_job_pays_for_the_work_done(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    job = a_job(account, num_steps=10)
    lease_now(engine)
    done = WorkDone()
    done.reach(text=1, denoise=4)
    done.reach(denoise=5)
    done.reach(denoise=2)
    outcome = settle_now(engine, store, job, done, cancellation())
    assert (job.quoted, outcome.charged, outcome.refunded) == (26, 12, 14)
    now = read_account(engine, account.id)
    assert (now.reserved, now.spent) == (0, 12)
    assert job_now(engine, job).state is JobState.CANCELLED


def test_passes_that_were_skipped_cost_nothing(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    """Of 10 steps of two passes each, 7 passes; an attempt that starts over adds none."""
    account = an_account()
    job = a_job(account, num_steps=10)
    lease_now(engine)
    done = WorkDone()
    done.reach(text=1, denoise=10, decode=200, media=1, skipped=7)
    done.reach(denoise=4, skipped=2)
    ending = Ending(JobState.SUCCEEDED, "made", charge_work=True)
    outcome = settle_now(engine, store, job, done, ending)
    # of 26 credits 2 + 90 * 13 / 20 + 6 + 2 parts of 100
    assert (job.quoted, outcome.charged, outcome.refunded) == (26, 18, 8)
    assert done.came(read_stored(job.request), WorkWeights()) == 1


def test_a_failed_job_costs_nothing(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    job = a_job(account)
    lease_now(engine)
    failure = Ending(JobState.FAILED, "fault", charge_work=False, error_code="internal")
    outcome = settle_now(engine, store, job, WorkDone(1, 3, 13, 0), failure)
    assert (outcome.charged, outcome.refunded) == (0, 26)
    assert read_account(engine, account.id).available == account.available


def test_a_lost_lease_settles_nothing(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    job = a_job(account)
    lease_now(engine, "other")
    with pytest.raises(LeaseLost):
        settle_now(engine, store, job, WorkDone(1, 3, 13, 1), cancellation())
    now = read_account(engine, account.id)
    assert (now.reserved, now.spent) == (26, 0)


def test_admission_is_all_or_nothing(
    engine: Engine, an_account: AnAccount, a_job: AJob, door: Any,
    a_request: Callable[..., VideoRequest],
) -> None:  # fmt: skip
    account = an_account(credits=1000)
    for _ in range(4):
        a_job(account)
    with pytest.raises(TooManyJobs):
        door.admission.admit(account, a_request(), {"start_image": b"image"})
    now = read_account(engine, account.id)
    assert (now.available, now.reserved) == (1000 - 4 * 26, 4 * 26)
    assert list(door.store.list("")) == []


def test_an_admission_whose_answer_is_lost_keeps_the_jobs_image(
    engine: Engine, an_account: AnAccount, door: Any, a_request: Callable[..., VideoRequest]
) -> None:
    """The connection ends after the COMMIT: the client asks again, and finds the job."""
    account = an_account(credits=1000)
    attempt = Attempt("fields", "key")

    def lose(connection: Any, _record: Any) -> None:
        if engine.dialect.name == "postgresql":
            connection.close()
        raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    event.listen(door.admission.engine, "checkin", lose, once=True)
    with pytest.raises(OperationalError):
        door.admission.admit(account, a_request(), {"start_image": b"image"}, attempt)
    job = door.admission.find_first(account, attempt)
    assert job is not None
    assert door.store.get(job.request["start_image"]) == b"image"


def test_parallel_admissions_never_exceed_the_limit(
    engine: Engine, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account(credits=1000)
    refused: list[TooManyJobs] = []

    def admit() -> None:
        try:
            a_job(account)
        except TooManyJobs as error:
            refused.append(error)

    threads = [threading.Thread(target=admit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 8
    assert read_account(engine, account.id).reserved == 4 * 26


def test_what_a_kill_left_of_a_job_without_a_video_is_deleted(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    account = an_account()
    vain, good = a_job(account), a_job(account)
    for job, ending in (
        (vain, cancellation()),
        (good, Ending(JobState.SUCCEEDED, "done", charge_work=True, video_key="k", size_bytes=1)),
    ):
        lease_now(engine)
        settle_now(engine, store, job, WorkDone(), ending)
        for rendition in Rendition:  # as if its pipeline had been killed right after the COMMIT
            store.put(rendition_key(job.id, rendition), b"late")
    Purger(engine, store).purge_unpublished()
    left = {info.key for info in store.list("")}
    assert left == {rendition_key(good.id, rendition) for rendition in Rendition}


def test_a_video_that_was_published_in_vain_is_deleted(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob
) -> None:
    job = a_job(an_account())
    lease_now(engine)
    store.put(f"videos/{job.id}.mp4", b"video")
    settle_now(engine, store, job, WorkDone(1, 3, 13, 1), cancellation())
    assert list(store.list("")) == []


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_job_that_has_ended_has_no_checkpoint(
    engine: Engine, store: LocalObjectStore, an_account: AnAccount, a_job: AJob, state: JobState
) -> None:
    account = an_account()
    job, other = a_job(account), a_job(account)
    lease_now(engine)
    for kept in (job, other):
        store.put(checkpoint_key(kept.id), b"state")
    settle_now(engine, store, job, WorkDone(1), Ending(state, "over", charge_work=False))
    assert [info.key for info in store.list("checkpoints/")] == [checkpoint_key(other.id)]


def write_by_a_newer_version(engine: Engine, job: Job) -> Job:
    with engine.begin() as connection:
        new = {"camera": "orbit", "family": "wan", "fps": 240, "tags": ["a"]}
        fields = {**job.request, "start_image": f"inputs/{job.id}", **new}
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(request=fields))
    return job_now(engine, job)


def test_a_job_of_a_newer_version_is_shown_and_its_credits_come_back(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob, door: Any
) -> None:
    job = write_by_a_newer_version(engine, a_job(alice))
    store.put(f"inputs/{job.id}", b"image")
    assert door.as_account()("GET", "/v1/videos").json()["data"][0]["prompt"] == "a red circle"
    lease_now(engine)
    failure = Ending(JobState.FAILED, "fault", charge_work=False, error_code="internal")
    settle_now(engine, store, job, WorkDone(), failure)
    assert read_account(engine, alice.id).available == alice.available
    assert list(store.list("")) == []


def test_what_a_newer_version_did_of_its_job_is_charged_when_that_is_cancelled(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob
) -> None:
    job = write_by_a_newer_version(engine, a_job(alice, num_steps=10))
    lease_now(engine)
    steps = [Progress(Phase.DENOISE, 1, step=step, num_steps=10) for step in range(6)]
    tell(engine, job, *steps)
    told = work_told(engine, job_now(engine, job))
    assert settle_now(engine, store, job, told, cancellation()).charged == 12


def test_a_job_of_a_newer_version_can_be_cancelled_and_expires(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob, door: Any
) -> None:
    cancelled = write_by_a_newer_version(engine, a_job(alice))
    assert door.as_account()("DELETE", f"/v1/videos/{cancelled.id}").status_code == 200
    assert job_now(engine, cancelled).state is JobState.CANCELLED
    overdue = write_by_a_newer_version(engine, a_job(alice))
    with engine.begin() as connection:
        connection.execute(update(jobs).values(created_at_ms=1))
    assert expire_jobs(engine, store, WorkWeights(), LeaseConfig(), "sweeper") == 1
    assert job_now(engine, overdue).state is JobState.FAILED
    assert read_account(engine, alice.id).reserved == 0


def tell(engine: Engine, job: Job, *moments: Progress) -> None:
    for progress in moments:
        with engine.begin() as connection:
            record(connection, job.id, "me", progress)


def test_work_that_was_told_is_charged_though_its_pipeline_is_dead(
    engine: Engine, alice: Account, a_job: AJob, door: Any
) -> None:
    """As if its denoiser was to go on in another tier, where nobody has taken it yet."""
    job = a_job(alice, num_steps=10)
    assert work_told(engine, job) == WorkDone()
    lease_now(engine)
    steps = [Progress(Phase.DENOISE, 1, step=step, num_steps=10) for step in range(6)]
    steps += [Progress(Phase.DENOISE, 1, step=5, num_steps=10, skipped=4)]
    texts = [Progress(Phase.TEXT, 1, step=step, num_steps=1) for step in range(2)]
    tell(engine, job, *texts, *steps)
    with engine.begin() as connection:
        move(connection, job.id, "me", "local")
    assert work_told(engine, job_now(engine, job)) == WorkDone(text=1, denoise=5, skipped=4)
    assert door.as_account()("DELETE", f"/v1/videos/{job.id}").status_code == 200
    assert job_now(engine, job).charged == 8  # of 26, 2 + 90 * 6 / 20 parts of 100


def test_steps_that_a_source_video_saves_are_not_recalled_as_made() -> None:
    def event(seq: int, progress: Progress) -> JobEvent:
        return JobEvent(seq, progress, 0, None)

    done = WorkDone()
    done.recall([event(1, Progress(Phase.TEXT, 0)), event(2, Progress(Phase.DENOISE, 1, 7))])
    assert done == WorkDone(text=0, denoise=1), "its text was there from a request before"
    done.recall([event(3, Progress(Phase.TEXT, 0, step=1, num_steps=1))])
    steps = [0, 7, 8, 0, 8, 9]  # begun at step 6; a second attempt went on from a checkpoint
    done.recall([event(seq, Progress(Phase.DENOISE, 1, step)) for seq, step in enumerate(steps)])
    assert done == WorkDone(text=1, denoise=3)
    done.recall([event(9, Progress(Phase.DECODE, 1, frame=8))])
    assert done == WorkDone(text=1, denoise=3, decode=8)


@pytest.mark.parametrize(
    ("purge", "name"),
    [(Purger.purge_unpublished, "videos/{}.mp4"), (Purger.purge_orphans, "inputs/{}")],
)
def test_a_file_that_cannot_be_deleted_keeps_no_other(
    engine: Engine, store: LocalObjectStore, alice: Account, a_job: AJob,
    purge: Callable[[Purger], None], name: str,
) -> None:  # fmt: skip
    ended = [a_job(alice), a_job(alice)]
    for _ in ended:
        lease_now(engine)
    for job in ended:
        settle_now(engine, store, job, WorkDone(), cancellation())
    orphans = [name.format(job.id) for job in ended]
    for key in orphans:
        store.put(key, b"1")
    obstacle, other = map(store.path, orphans)
    purger = Purger(engine, store)
    purger.suspects = set(orphans)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == obstacle:
            raise PermissionError(path)
        unlink(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(Path, "unlink", refuse)
        purge(purger)
    assert obstacle.exists()
    assert not other.exists()
    purge(purger)
    assert not obstacle.exists()
