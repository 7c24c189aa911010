"""What happened to a job, in order: the rows that progress is shown from."""

from sqlalchemy import ColumnElement, Connection, Insert, bindparam, func, insert, literal, select

from jobs.job import JobEvent, JobId, JobState, Phase, Progress
from jobs.tables import job_events, now_ms

# Built once: it is run at every step of every job.
_NEXT_SEQ = select(func.coalesce(func.max(job_events.c.seq), 0) + 1).where(
    job_events.c.job_id == bindparam("of_job")
)
_APPEND = insert(job_events).values(seq=_NEXT_SEQ.scalar_subquery(), created_at_ms=now_ms())


def first_event(job_id: ColumnElement[str], created_at_ms: ColumnElement[int]) -> Insert:
    """The event of a job that is enqueued by the same statement."""
    columns = ["job_id", "created_at_ms", "seq", "phase"]
    counts = ["percentage", "step", "num_steps", "frame", "num_frames"]
    row = select(job_id, created_at_ms, literal(1), literal(Phase.QUEUED.value))
    return insert(job_events).from_select(columns + counts, row.add_columns(*[literal(0)] * 5))


def append_event(
    connection: Connection,
    job_id: str,
    progress: Progress,
    state: JobState | None,
    *,
    percentage: int | None = None,
) -> None:
    """Add a job's next event, in the transaction that changes the job's row."""
    connection.execute(
        _APPEND,
        {
            "job_id": job_id,
            "of_job": job_id,
            "phase": progress.phase,
            "percentage": progress.percentage if percentage is None else percentage,
            "step": progress.step,
            "num_steps": progress.num_steps,
            "frame": progress.frame,
            "num_frames": progress.num_frames,
            "skipped": progress.skipped,
            "state": state,
        },
    )


def events_after(connection: Connection, job_id: JobId, seq: int) -> list[JobEvent]:
    """The events of a job behind seq, in order; seq 0 gives all."""
    rows = connection.execute(
        select(job_events)
        .where(job_events.c.job_id == job_id, job_events.c.seq > seq)
        .order_by(job_events.c.seq)
    )
    return [
        JobEvent(
            row.seq,
            Progress(
                Phase(row.phase),
                row.percentage,
                row.step,
                row.num_steps,
                row.frame,
                row.num_frames,
                row.skipped,
            ),
            row.created_at_ms,
            None if row.state is None else JobState(row.state),
        )
        for row in rows
    ]
