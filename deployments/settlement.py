"""Ends a job: its state, its charge and its last event change in one transaction."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sqlalchemy import Engine

from credits.ledger import AlreadySettled, ReservationId
from credits.ledger import settle as settle_reservation
from credits.pricing import Credits, Passes, WorkWeights, charge, share_done
from deployments.checkpoints import checkpoint_key
from deployments.database import reader
from jobs.events import events_after
from jobs.job import Job, JobEvent, JobState, Outcome, Phase
from jobs.outbox import announce
from jobs.store import LeaseLost, finish, request_cancel
from media.object_store import ObjectStore
from media.renditions import delete_renditions
from models.request import VideoRequest, read_stored, stored_inputs


@dataclass(slots=True)
class WorkDone:
    """How far each stage of a job ever came; a pass run again after a fault counts once.

    skipped: passes of the model that the denoise steps made do without.
    """

    text: int = 0
    denoise: int = 0
    decode: int = 0
    media: int = 0
    skipped: int = 0

    def reach(self, **passes: int) -> None:
        """Note that a stage came this far."""
        for stage, count in passes.items():
            setattr(self, stage, max(getattr(self, stage), count))

    def recall(self, events: Sequence[JobEvent]) -> None:
        """What earlier attempts did, as far as they told of it.

        A denoise that begins at a later step (of a source video) has not made those before.
        """
        phases = [(event.progress.phase, event.progress.step) for event in events]
        # a text that was there from a request before has no step
        self.reach(text=max((step for phase, step in phases if phase is Phase.TEXT), default=0))
        steps = [step for phase, step in phases if phase is Phase.DENOISE]
        if made := [step for step in steps if step > 0]:
            self.reach(denoise=max(made) - min(made) + 1)
        self.reach(skipped=max((event.progress.skipped for event in events), default=0))
        self.reach(decode=max((event.progress.frame for event in events), default=0))

    def share(self, request: VideoRequest, weights: WorkWeights) -> Fraction:
        """Weighted work done over the work that the request takes, 0..1."""
        per_step = request.passes_per_step
        planned = Passes(1, request.num_steps * per_step, request.num_frames, 1)
        passes = max(0, self.denoise * per_step - self.skipped)
        return share_done(weights, planned, Passes(self.text, passes, self.decode, self.media))

    def came(self, request: VideoRequest, weights: WorkWeights) -> Fraction:
        """The same, with what was skipped: how far it is from its end."""
        return replace(self, skipped=0).share(request, weights)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a job ends. charge_work is False where the fault is ours: then all is refunded.

    expired: nobody finished the job in the time that any job has.
    """

    state: JobState
    reason: str
    charge_work: bool
    expired: bool = False
    video_key: str | None = None
    size_bytes: int | None = None
    result: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None


def settle(
    engine: Engine,
    store: ObjectStore,
    weights: WorkWeights,
    job: Job,
    *,
    lease_owner: str | None,
    done: WorkDone,
    ending: Ending,
) -> Outcome:
    """Charge the work done, refund the rest, end the job; LeaseLost changes nothing.

    The request need not be one that this version could run.
    """
    charged = Credits(0)
    if ending.charge_work:
        share = done.share(read_stored(job.request), weights)
        charged = charge(Fraction(job.quote_exact), Credits(job.quoted), share)
    outcome = Outcome(
        state=ending.state,
        charged=charged,
        refunded=job.quoted - charged,
        reason=ending.reason,
        video_key=ending.video_key,
        size_bytes=ending.size_bytes,
        result=ending.result,
        error_code=ending.error_code,
        error_message=ending.error_message,
    )
    with engine.begin() as connection:
        finish(connection, job.id, lease_owner=lease_owner, outcome=outcome)
        announce(connection, job.id, ending.state)
        reservation_id = ReservationId(job.reservation_id)
        more_bytes = (ending.size_bytes or 0) - job.estimated_bytes
        settle_reservation(
            connection, reservation_id, charged, expired=ending.expired, more_bytes=more_bytes
        )
    for key in (*stored_inputs(job.request), checkpoint_key(job.id)):
        store.delete(key)
    if ending.video_key is None:
        delete_renditions(store, job.id)  # published, but cancelled or lost before the end
    return outcome


def cancel(engine: Engine, store: ObjectStore, weights: WorkWeights, job: Job) -> None:
    """End a job that is still queued; ask whoever runs it otherwise to stop at the next step.

    The request is written first: a kill in between, or a pipeline that leases the job meanwhile,
    leaves a job that its pipeline cancels.
    """
    with engine.begin() as connection:
        request_cancel(connection, job.id)
    if job.state is JobState.QUEUED:
        # LeaseLost, AlreadySettled: a pipeline has it by now, and reads the request.
        with contextlib.suppress(LeaseLost, AlreadySettled):
            done, ending = work_told(engine, job), cancellation()
            settle(engine, store, weights, job, lease_owner=None, done=done, ending=ending)


def work_told(engine: Engine, job: Job) -> WorkDone:
    """What was done of a job before its pipeline died or another tier was to run it."""
    done = WorkDone()
    if job.attempt > 0:
        with reader(engine).begin() as connection:
            done.recall(events_after(connection, job.id, 0))
    return done


def expiry() -> Ending:
    """Nobody finished the job in the time that any job has; all is given back."""
    return Ending(
        JobState.FAILED,
        "expired: all is refunded",
        charge_work=False,
        expired=True,
        error_code="expired",
        error_message="The video was not made in time; the credits are refunded.",
    )


def cancellation() -> Ending:
    """The owner asked for the end; the work that was done is charged."""
    return Ending(
        JobState.CANCELLED,
        "cancelled: the work done is charged, the rest refunded",
        charge_work=True,
        error_code="cancelled",
        error_message="The video was cancelled.",
    )
