"""How long finished videos are kept, and which files nobody needs any more.

The caller owns the transaction.
"""

from sqlalchemy import Connection, select, update

from jobs.job import FINAL_STATES, Job, JobId, JobState
from jobs.store import locked_in_order, to_job
from jobs.tables import jobs, now_ms

# Once a statement, so that an index may be asked.
_HAS_EXPIRED = jobs.c.expires_at_ms <= select(now_ms()).scalar_subquery()


def mark_deleted(connection: Connection, job_id: JobId, *, only_expired: bool = False) -> int:
    """Hide a finished job from its owner; the bytes of its video, 0 if it was hidden before.

    `purgeable` then lists its files. only_expired: unless it is to be kept after all.
    """
    wanted = [_HAS_EXPIRED] if only_expired else []
    row = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(FINAL_STATES), ~jobs.c.deleted, *wanted)
        .values(deleted=True)
        .returning(jobs.c.size_bytes)
    ).first()
    return 0 if row is None else row.size_bytes or 0


def keep_for(connection: Connection, account_id: str, kept_ms: int | None) -> None:
    """An account's videos are kept so long from now on, those that are there already too."""
    expires_at = None if kept_ms is None else now_ms() + kept_ms
    for changed, values in (
        (jobs.c.state.not_in(FINAL_STATES), {"kept_ms": kept_ms}),
        (jobs.c.state == JobState.SUCCEEDED, {"kept_ms": kept_ms, "expires_at_ms": expires_at}),
    ):
        of_account = locked_in_order(jobs.c.account_id == account_id, ~jobs.c.deleted, changed)
        connection.execute(update(jobs).where(of_account).values(values))


def expired_videos(connection: Connection, limit: int = 100) -> list[Job]:
    """Jobs whose videos have been kept for as long as they were to be, the first first."""
    query = (
        select(jobs)
        .where(_HAS_EXPIRED, ~jobs.c.deleted)
        .order_by(jobs.c.expires_at_ms)
        .limit(limit)
    )
    return [to_job(row) for row in connection.execute(query)]


def purgeable(connection: Connection, limit: int = 100) -> list[Job]:
    """Deleted jobs whose files may still exist."""
    query = select(jobs).where(jobs.c.deleted, jobs.c.video_key.is_not(None)).limit(limit)
    return [to_job(row) for row in connection.execute(query)]


def ended_in_vain(connection: Connection, max_age_ms: int) -> list[JobId]:
    """Jobs that were started and ended without a video, no longer than max_age_ms ago."""
    rows = connection.execute(
        select(jobs.c.id).where(
            jobs.c.state.in_((JobState.FAILED, JobState.CANCELLED)),
            jobs.c.started_at_ms.is_not(None),
            jobs.c.finished_at_ms > now_ms() - max_age_ms,
        )
    )
    return [JobId(row.id) for row in rows]


def mark_purged(connection: Connection, job_id: JobId) -> None:
    """The files of a deleted job are gone."""
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(video_key=None))
