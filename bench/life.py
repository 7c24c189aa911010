"""One account's one job, from the request to the last thing told of it, and those who take over.

The acts are the production functions; `bench.fault_points` lets whoever does one die in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select, update

from autoscaling.tiers import GpuTier, ServedOn
from bench.money_world import LAWS, LEASE_MS
from credits.accounts import AccountId, create_account, get_account
from credits.ledger import grant, reservations, settlements
from credits.plans import Plan, PlanTable
from credits.pricing import Credits, PriceTable, WorkWeights
from deployments.admission import Admission, Offer
from deployments.checkpoints import checkpoint_key
from deployments.config import LeaseConfig
from deployments.database import open_database, reader
from deployments.expiry import expire_jobs
from deployments.idempotency import Attempt
from deployments.purge import Purger
from deployments.settlement import Ending, WorkDone, cancel, cancellation, settle
from deployments.webhooks import LEASE_MS as WEBHOOK_LEASE_MS
from jobs.job import FINAL_STATES, Job, JobState, Phase, Progress
from jobs.leases import extend_leases, lease
from jobs.outbox import claim_delivery, mark_delivered, webhook_deliveries
from jobs.store import list_jobs, record
from jobs.tables import jobs
from jobs.webhooks import create_endpoint, webhook_endpoints
from media.object_store import LocalObjectStore
from models.catalog import Model

GRANTED = 1000


class Life:
    """One account's one job, on a database that many of them share."""

    def __init__(self, url: str, folder: Path, model: Model, name: str) -> None:
        self.engine = open_database(url)
        self.store = LocalObjectStore(folder)
        self.model = model
        offers = {model.id: Offer(model, (ServedOn(tier=GpuTier.LOCAL),))}
        self.admission = Admission(self.engine, self.store, offers, PriceTable(), PlanTable())
        self.account_id = AccountId(name)

    def close(self) -> None:
        """Give the connections back; the next act opens others."""
        self.engine.dispose()

    def begin(self) -> None:
        """An account with credits, a webhook and no job."""
        with self.engine.begin() as connection:
            create_account(connection, self.account_id, self.account_id, Plan.ENTERPRISE)
            grant(connection, self.account_id, Credits(GRANTED))
            types = ["video.completed", "video.failed"]
            create_endpoint(
                connection, self.account_id, name="", url="https://x", event_types=types
            )

    def admit(self) -> None:
        """The client sends its request, with its key."""
        with reader(self.engine).begin() as connection:
            account = get_account(connection, self.account_id)
        request = self.model.resolve({"prompt": "x", "num_frames": 13, "seed": 1})
        attempt = Attempt("fields", f"key of {self.account_id}")
        if self.admission.find_first(account, attempt) is None:
            self.admission.admit(account, request, {"start_image": b"image"}, attempt)

    def lease(self, owner: str = "first") -> Job | None:
        """A pipeline takes the next job."""
        with self.engine.begin() as connection:
            return lease(connection, owner, [GpuTier.LOCAL], LEASE_MS)

    def extend(self) -> None:
        """The pipeline's heartbeat."""
        with self.engine.begin() as connection:
            extend_leases(connection, "first", {self.job().id}, LEASE_MS)

    def record(self, owner: str = "first") -> None:
        """The pipeline records a step, of which the denoiser has kept the state."""
        self.store.put(checkpoint_key(self.job().id), b"state")
        with self.engine.begin() as connection:
            record(connection, self.job().id, owner, Progress(Phase.DENOISE, 10, 1, 10))

    def settle(self, owner: str = "first") -> None:
        """The pipeline publishes and settles, or ends what is cancelled."""
        job = self.job()
        ending = cancellation()
        if not job.cancel_requested:
            key = f"videos/{job.id}.mp4"
            self.store.put(key, b"video")
            ending = Ending(JobState.SUCCEEDED, "done", charge_work=True, video_key=key)
        done = WorkDone(1, 99, 99, 1)
        settle(
            self.engine,
            self.store,
            WorkWeights(),
            job,
            lease_owner=owner,
            done=done,
            ending=ending,
        )

    def cancel(self) -> None:
        """The owner deletes the video."""
        job = self.job()
        if job.state not in FINAL_STATES:
            cancel(self.engine, self.store, WorkWeights(), job)

    def expire(self) -> None:
        """A day has passed, and a sweeper looks."""
        with self.engine.begin() as connection:
            connection.execute(
                update(jobs).where(jobs.c.id == self.job().id).values(created_at_ms=1)
            )
        expire_jobs(self.engine, self.store, WorkWeights(), LeaseConfig(), "sweeper")

    def tell(self) -> None:
        """The sender tells the webhook's endpoint, which takes it."""
        with self.engine.begin() as connection:
            claimed = claim_delivery(connection, WEBHOOK_LEASE_MS)
        if claimed is not None:
            with self.engine.begin() as connection:
                mark_delivered(connection, claimed[0])

    def job(self) -> Job:
        """The account's one job."""
        with reader(self.engine).begin() as connection:
            found = list_jobs(connection, self.account_id, after=None, limit=2, ascending=True)
        (job,) = found
        return job

    def recover(self, again: Callable[["Life"], object]) -> None:
        """What those do who are left: the client asks again, and a pipeline takes what is free."""
        with self.engine.begin() as connection:
            run_out = {"lease_expires_at_ms": 1}
            held = jobs.c.state == JobState.RUNNING
            connection.execute(update(jobs).where(held).values(run_out))
            connection.execute(update(webhook_deliveries).values(next_at_ms=0))
        again(self)
        while self.lease("second") is not None:
            if not self.job().cancel_requested:
                self.record("second")
            self.settle("second")
        self.tell()
        purger = Purger(self.engine, self.store)
        for _ in range(2):  # what it sees twice is left behind
            purger.purge_orphans()

    def faults(self, ends: JobState) -> list[str]:
        """What is wrong in the end, in words."""
        job = self.job()
        with reader(self.engine).begin() as connection:
            found = [fault for law in LAWS for fault in law(connection)]
            account = get_account(connection, self.account_id)
            of_account = reservations.c.account_id == self.account_id
            settled = connection.execute(
                select(func.count()).select_from(settlements).join(reservations).where(of_account)
            ).scalar_one()
            told = connection.execute(
                select(func.count())
                .select_from(webhook_deliveries)
                .join(webhook_endpoints)
                .where(
                    webhook_endpoints.c.account_id == self.account_id,
                    webhook_deliveries.c.state == "delivered",
                )
            ).scalar_one()
        if job.state is not ends:
            found.append(f"the job is {job.state}, not {ends}")
        if settled != 1:
            found.append(f"{settled} settlements")
        if account.reserved or account.open_reservations:
            found.append(f"{account.reserved} credits are still reserved")
        charge = job.quoted if ends is JobState.SUCCEEDED else job.charged or 0
        if account.spent != charge or account.available != GRANTED - charge:
            found.append(f"{account.spent} spent, {charge} charged")
        if told != 1:
            found.append(f"told {told} times")
        if list(self.store.list("inputs/")):
            found.append("the start image is left")
        return found


@dataclass(frozen=True, slots=True)
class Step:
    """One act of a job's life: who does it, after which others, what comes again, how it ends."""

    role: str
    name: str
    before: tuple[Callable[[Life], object], ...]
    act: Callable[[Life], object]
    again: Callable[[Life], object]
    ends: JobState = JobState.SUCCEEDED


def _nothing(_life: Life) -> None:
    """Nobody asks again."""


def _cancel_again(life: Life) -> None:
    life.cancel()


STEPS = (
    Step("ingress", "admit", (), Life.admit, Life.admit),
    Step("pipeline", "lease", (Life.admit,), Life.lease, _nothing),
    Step("pipeline", "extend the lease", (Life.admit, Life.lease), Life.extend, _nothing),
    Step("pipeline", "record a step", (Life.admit, Life.lease), Life.record, _nothing),
    Step("pipeline", "settle", (Life.admit, Life.lease), Life.settle, _nothing),
    Step("ingress", "cancel, queued", (Life.admit,), Life.cancel, _cancel_again,
         JobState.CANCELLED),
    Step("ingress", "cancel, running", (Life.admit, Life.lease), Life.cancel, _cancel_again,
         JobState.CANCELLED),
    Step("pipeline", "settle, cancelled", (Life.admit, Life.lease, Life.cancel), Life.settle,
         _nothing, JobState.CANCELLED),
    Step("sweeper", "expire", (Life.admit,), Life.expire, Life.expire, JobState.FAILED),
    Step("sender", "tell a webhook", (Life.admit, Life.lease, Life.settle), Life.tell, _nothing),
)  # fmt: skip
