"""Kills a process, or its database connection, before every statement of a job's life.

Each row of the table is one point of one act: a child process runs the production function and dies
there by SIGKILL, or finds its connection ended by the server. Then come those who are left: the
client sends its request again, another pipeline takes what has no holder. At the end there must be
one job, one settlement, one charge and nothing reserved.
"""

import argparse
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, func, select, text, update
from sqlalchemy.exc import OperationalError

from autoscaling.tiers import GpuTier, ServedOn
from bench.databases import fresh_database, fresh_sqlite, running_postgresql
from bench.machine import describe_machine
from bench.money_world import LAWS, LEASE_MS
from credits.accounts import AccountId, create_account, get_account
from credits.ledger import AlreadySettled, grant, reservations, settlements
from credits.plans import Plan, PlanTable
from credits.pricing import Credits, PriceTable, WorkWeights
from deployments.admission import Admission, Offer
from deployments.config import LeaseConfig
from deployments.database import migrate, open_database, reader
from deployments.expiry import expire_jobs
from deployments.idempotency import Attempt
from deployments.purge import Purger
from deployments.settlement import Ending, WorkDone, cancel, cancellation, settle
from deployments.webhooks import LEASE_MS as WEBHOOK_LEASE_MS
from jobs.job import FINAL_STATES, Job, JobState, Phase, Progress
from jobs.store import LeaseLost, extend_leases, lease, list_jobs, record
from jobs.tables import jobs
from jobs.webhooks import (
    claim_delivery,
    create_endpoint,
    mark_delivered,
    webhook_deliveries,
    webhook_endpoints,
)
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model
from training.random_checkpoint import write_random_checkpoint

GRANTED = 1000
MAX_POINTS = 60
DIED = ("process", "connection")


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
        """The pipeline records a step."""
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
            purger.purge_inputs()

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


@dataclass(frozen=True, slots=True)
class Row:
    """A point and what came of it."""

    role: str
    step: str
    point: str
    died: str
    faults: list[str]


def run_points(
    url: str, folder: Path, model: Model, died: str, steps: Sequence[Step] = STEPS
) -> Iterator[Row]:
    """Every point of these steps."""
    for step in steps:
        for index in range(1, MAX_POINTS):
            name = f"{step.role}-{step.name}-{died}-{index}"
            with contextlib.closing(Life(url, folder, model, name)) as life:
                life.begin()
                for act in step.before:
                    act(life)
                life.close()  # a connection is not to be shared with a child
                point = _die_at(url, folder, model, name, step, index, died)
                life.recover(step.again)
                if point is None:
                    break
                row = Row(step.role, step.name, point, died, life.faults(step.ends))
            yield row
        else:
            raise RuntimeError(f"{step.name} has more than {MAX_POINTS} points")


def _die_at(
    url: str, folder: Path, model: Model, name: str, step: Step, index: int, died: str
) -> str | None:
    """Run the step in a child that dies at its index-th point; the point, None if it has fewer."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(told)
            life = Life(url, folder, model, name)
            _arm(life.engine, index, died, tell)
            with contextlib.suppress(OperationalError, LeaseLost, AlreadySettled):
                step.act(life)
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    with os.fdopen(told) as said:
        point = said.read()
    _, status = os.waitpid(child, 0)
    if died == "process" and point and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"{name}: the child was not killed at {point}")
    if os.waitstatus_to_exitcode(status) == 1:
        raise RuntimeError(f"{name}: the child failed at {point!r}")
    return point or None


def _arm(engine: Engine, index: int, died: str, tell: int) -> None:
    """Count statements and commits; die before the index-th of them."""
    count = 0

    def at(connection: Connection, what: str) -> None:
        nonlocal count
        count += 1
        if count != index:
            return
        os.write(tell, what.encode())
        if died == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        _end_connection(connection)

    def before_statement(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        at(connection, " ".join(statement.split())[:34])

    event.listen(engine, "before_cursor_execute", before_statement)
    event.listen(engine, "commit", lambda connection: at(connection, "COMMIT"))
    # What follows a COMMIT, before the act returns.
    event.listen(engine, "checkin", lambda *_: _after_commit())

    def _after_commit() -> None:
        nonlocal count
        count += 1
        if count == index and died == "process":
            os.write(tell, b"(after it)")
            os.kill(os.getpid(), signal.SIGKILL)
        elif count == index:
            os.write(tell, b"(after it)")


def _end_connection(connection: Connection) -> None:
    """As an operator, a proxy or a fail-over does."""
    pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
    other = open_database(connection.engine.url.render_as_string(hide_password=False))
    with other.begin() as its_own:
        its_own.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    other.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fault_points", description=__doc__)
    parser.parse_args()
    print(describe_machine())
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = folder / "tiny"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, dim=64, num_layers=1)
        model = load_model(checkpoint)
        server = stack.enter_context(running_postgresql())
        urls = {
            "postgresql": stack.enter_context(fresh_database(server)),
            "sqlite": stack.enter_context(fresh_sqlite()),
        }
        for kind, url in urls.items():
            engine = open_database(url)
            migrate(engine)
            engine.dispose()
            rows = [
                row
                for died in (DIED if kind == "postgresql" else DIED[:1])
                for row in run_points(url, folder / kind, model, died)
            ]
            for row in rows:
                verdict = "; ".join(row.faults) or "ok"
                print(
                    f"{kind:11}{row.role:9}{row.step:18}{row.died:11}{row.point:36}{verdict}",
                    flush=True,
                )
            result[kind] = {
                "points": len(rows),
                "violations": sum(bool(row.faults) for row in rows),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
