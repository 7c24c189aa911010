"""A small world of accounts, clients and pipelines on a real database, and the laws of its money.

The acts are the production functions. One act at a time may be made to crash before any of its
statements or before its COMMIT, as a process does that is killed there: the database then takes
back the transaction, and whoever asked learns nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, func, select, update

from autoscaling.tiers import GpuTier, ServedOn
from bench.clusters import no_pools
from credits.accounts import (
    AccountDisabled,
    AccountId,
    accounts,
    create_account,
    get_account,
    release_bytes,
)
from credits.ledger import (
    AlreadySettled,
    EntryKind,
    InsufficientCredits,
    entries,
    grant,
    reservations,
    settlements,
)
from credits.plans import Plan, PlanTable, TooManyJobs
from credits.pricing import Credits, PriceTable, WorkWeights
from deployments.admin_routes import AdminRoutes
from deployments.admission import Admission, Offer
from deployments.authentication import AdminAuthenticator
from deployments.config import LeaseConfig
from deployments.database import migrate, open_database, reader
from deployments.expiry import expire_jobs
from deployments.idempotency import Attempt
from deployments.settlement import Ending, WorkDone, cancel, cancellation, settle
from deployments.wire_bodies import AccountChange
from jobs.job import FINAL_STATES, Job, JobId, JobState, Phase, Progress
from jobs.leases import lease
from jobs.retention import mark_deleted
from jobs.store import JobNotFound, LeaseLost, get_job, record, stored_bytes
from jobs.tables import job_events, jobs
from media.object_store import LocalObjectStore
from models.catalog import Model

NUM_ACCOUNTS = 3
MAX_JOBS = 3
OWNERS = ("pipeline-1", "pipeline-2")
LEASE_MS = 3_600_000
REFUSALS = (
    *(InsufficientCredits, TooManyJobs, AccountDisabled),
    *(LeaseLost, AlreadySettled, JobNotFound),
)


class Crashed(BaseException):
    """The process was killed here; no `except Exception` sees it."""


class World:
    """All acts name accounts and jobs by index, so that a list of numbers is a whole history."""

    def __init__(self, url: str, folder: Path, model: Model) -> None:
        self.engine = open_database(url)
        migrate(self.engine)
        self.observer = open_database(url)
        self.store = LocalObjectStore(folder)
        self.model = model
        offers = {model.id: Offer(model, (ServedOn(tier=GpuTier.LOCAL),))}
        self.admission = Admission(self.engine, self.store, offers, PriceTable(), PlanTable())
        self.names = [AccountId(f"account-{index}") for index in range(NUM_ACCOUNTS)]
        with self.engine.begin() as connection:
            for name in self.names:
                create_account(connection, name, name, Plan.ENTERPRISE)
                connection.execute(
                    update(accounts).where(accounts.c.id == name).values(max_jobs=MAX_JOBS)
                )
        self.operator = AdminRoutes(
            self.engine,
            self.store,
            b"pepper",
            PlanTable(),
            WorkWeights(),
            AdminAuthenticator("unused"),
            lambda: None,
            no_pools,
        )
        self.crash_at: int | None = None
        self.num_statements = 0
        event.listen(self.engine, "before_cursor_execute", self._before_statement)
        event.listen(self.engine, "commit", self._before_commit)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        self.observer.dispose()

    @contextmanager
    def crashing(self, crash_at: int | None) -> Iterator[None]:
        """Within, the crash_at-th statement or COMMIT (from 1) is where the process dies."""
        self.crash_at, self.num_statements = crash_at, 0
        try:
            yield
        except Crashed:
            pass
        except REFUSALS:
            pass
        finally:
            self.crash_at = None

    def grant(self, account: int, amount: int) -> None:
        """The operator gives credits."""
        with self.engine.begin() as connection:
            grant(connection, self.names[account], Credits(amount))

    def admit(self, account: int, num_frames: int, key: str | None) -> None:
        """A client asks for a video, perhaps not for the first time."""
        with reader(self.observer).begin() as connection:
            found = get_account(connection, self.names[account])
        request = self.model.resolve({"prompt": "x", "num_frames": num_frames, "seed": 1})
        attempt = Attempt(f"hash-{num_frames}", key)
        if attempt.is_first or self.admission.find_first(found, attempt) is None:
            self.admission.admit(found, request, attempt=attempt)

    def lease(self, owner: int) -> None:
        """A pipeline takes the next job."""
        with self.engine.begin() as connection:
            lease(connection, OWNERS[owner], [GpuTier.LOCAL], LEASE_MS)

    def progress(self, owner: int, job: int, step: int) -> None:
        """A pipeline, perhaps one that has lost its lease, records a step."""
        with self.engine.begin() as connection:
            progress = Progress(Phase.DENOISE, min(step, 99), step, 100)
            record(connection, self._job(job).id, OWNERS[owner], progress)

    def finish(self, owner: int, job: int, steps: int, state: JobState) -> None:
        """A pipeline, perhaps one that has lost its lease, settles."""
        done = WorkDone(1, steps, steps // 2, 0)
        ending = cancellation()
        if state is not JobState.CANCELLED:
            ending = Ending(state, "simulated", charge_work=state is JobState.SUCCEEDED)
        self._settle(self._job(job), OWNERS[owner], done, ending)

    def cancel(self, job: int) -> None:
        """The owner deletes a video that is not finished."""
        cancel(self.engine, self.store, WorkWeights(), self._job(job))

    def retry(self, account: int, num_frames: int) -> None:
        """A client sends again, without a key, what it has had no answer to."""
        with reader(self.observer).begin() as connection:
            found = get_account(connection, self.names[account])
        request = self.model.resolve({"prompt": "x", "num_frames": num_frames, "seed": 1})
        self.admission.admit(found, request, attempt=Attempt(f"hash-{num_frames}", is_retry=True))

    def delete(self, job: int) -> None:
        """The owner deletes a video that is finished."""
        found = self._job(job)
        if found.state in FINAL_STATES:
            with self.engine.begin() as connection:
                release_bytes(connection, found.account_id, mark_deleted(connection, found.id))

    def disable(self, account: int, disabled: bool) -> None:
        """The operator takes an account its videos, or gives them back."""
        self.operator.change_account(self.names[account], AccountChange(disabled=disabled))

    def let_leases_run_out(self, owner: int) -> None:
        """A pipeline hangs or dies: none of its leases is extended."""
        with self.engine.begin() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.lease_owner == OWNERS[owner])
                .values(lease_expires_at_ms=1)
            )

    def expire(self, job: int) -> None:
        """A day passes for one job, and a sweeper looks."""
        with self.engine.begin() as connection:
            connection.execute(
                update(jobs).where(jobs.c.id == self._job(job).id).values(created_at_ms=1)
            )
        expire_jobs(self.engine, self.store, WorkWeights(), LeaseConfig(), "sweeper")

    def num_jobs(self) -> int:
        """How many jobs there have been."""
        with reader(self.observer).begin() as connection:
            return connection.execute(select(func.count()).select_from(jobs)).scalar_one()

    def violations(self) -> list[str]:
        """Every law that does not hold now, in words; none if all is well."""
        with reader(self.observer).begin() as connection:
            return [fault for law in LAWS for fault in law(connection)]

    def _job(self, index: int) -> Job:
        with reader(self.observer).begin() as connection:
            ids = connection.execute(select(jobs.c.id).order_by(jobs.c.number)).scalars().all()
            return get_job(connection, ids[index % len(ids)])

    def _settle(self, job: Job, owner: str | None, done: WorkDone, ending: Ending) -> None:
        settle(
            self.engine,
            self.store,
            WorkWeights(),
            job,
            lease_owner=owner,
            done=done,
            ending=ending,
        )

    def _before_statement(self, *_: Any) -> None:
        self._count()

    def _before_commit(self, _connection: Connection) -> None:
        self._count()

    def _count(self) -> None:
        self.num_statements += 1
        if self.num_statements == self.crash_at:
            raise Crashed


def balances_follow_from_the_ledger(connection: Connection) -> Iterator[str]:
    """What an account shows is what its rows add up to."""
    sides: Counter[str] = Counter()
    for row in connection.execute(select(entries)):
        sides[row.debit] -= row.amount
        sides[row.credit] += row.amount
    confirmed: Counter[str] = Counter()
    for row in connection.execute(select(entries).where(entries.c.kind == EntryKind.CONFIRM)):
        confirmed[row.account_id] += row.amount
    for account in connection.execute(select(accounts)):
        shown = (account.available, account.reserved, account.spent)
        summed = (
            sides[f"{account.id}:available"],
            sides[f"{account.id}:reserved"],
            confirmed[account.id],
        )
        if shown != summed:
            yield f"{account.id} shows {shown}, its entries add up to {summed}"
        if min(shown) < 0:
            yield f"{account.id} is overdrawn: {shown}"


def what_is_open_is_reserved(connection: Connection) -> Iterator[str]:
    """Each open job has a reservation that is not settled; each other reservation is settled."""
    held = {row.id: row for row in connection.execute(select(reservations))}
    settled = Counter(row.reservation_id for row in connection.execute(select(settlements)))
    found = {row.reservation_id: row for row in connection.execute(select(jobs))}
    open_jobs: Counter[str] = Counter()
    for reservation_id in held.keys() | found.keys():
        job, reservation = found.get(reservation_id), held.get(reservation_id)
        if job is None or reservation is None:
            yield f"{reservation_id}: job {job is not None}, reservation {reservation is not None}"
            continue
        is_open = job.state not in FINAL_STATES
        open_jobs[job.account_id] += is_open
        if settled[reservation_id] != (0 if is_open else 1):
            yield f"{job.id} is {job.state} and settled {settled[reservation_id]} times"
        if reservation.amount != job.quoted:
            yield f"{job.id}: {reservation.amount} reserved, {job.quoted} quoted"
    for account in connection.execute(select(accounts)):
        if account.open_reservations != open_jobs[account.id]:
            yield f"{account.id}: {account.open_reservations} open, {open_jobs[account.id]} counted"
        if open_jobs[account.id] > MAX_JOBS:
            yield f"{account.id} has {open_jobs[account.id]} jobs at once"


def a_job_shows_what_it_was_charged(connection: Connection) -> Iterator[str]:
    """Charged and refunded are the settlement's, and add up to what was quoted."""
    joined = select(jobs, settlements).join(
        settlements, settlements.c.reservation_id == jobs.c.reservation_id
    )
    for row in connection.execute(joined):
        if (row.charged, row.refunded) != (row.confirmed, row.refunded_1):
            yield f"{row.id} shows {row.charged}, was charged {row.confirmed}"
        if row.charged is not None and row.charged + row.refunded != row.quoted:
            yield f"{row.id}: {row.charged} + {row.refunded} is not {row.quoted}"


def videos_take_what_accounts_show(connection: Connection) -> Iterator[str]:
    """The room that an account has used is what its jobs' rows say."""
    by_jobs = stored_bytes(connection)
    for row in connection.execute(select(accounts.c.id, accounts.c.stored_bytes)):
        if row.stored_bytes != by_jobs.get(row.id, 0):
            yield f"{row.id} shows {row.stored_bytes} bytes, its jobs {by_jobs.get(row.id, 0)}"


def a_key_makes_one_job(connection: Connection) -> Iterator[str]:
    """Sent again, a request finds its first job."""
    keys = Counter(
        (row.account_id, row.idempotency_key)
        for row in connection.execute(select(jobs).where(jobs.c.idempotency_key.is_not(None)))
    )
    yield from (f"{key} made {count} jobs" for key, count in keys.items() if count > 1)


def events_tell_the_whole_story(connection: Connection) -> Iterator[str]:
    """Numbered from 1 without a gap; the final state is told once, last, by finished jobs only."""
    told: dict[str, list[Any]] = {}
    for row in connection.execute(select(job_events).order_by(job_events.c.seq)):
        told.setdefault(row.job_id, []).append(row)
    for job in connection.execute(select(jobs)):
        rows = told.get(JobId(job.id), [])
        if [row.seq for row in rows] != list(range(1, len(rows) + 1)) or not rows:
            yield f"{job.id}: events {[row.seq for row in rows]}"
        states = [row.state for row in rows if row.state is not None]
        expected = [job.state] if job.state in FINAL_STATES else []
        if states != expected or (expected and rows[-1].state is None):
            yield f"{job.id} is {job.state}, its events say {states}"


def the_disabled_make_nothing(connection: Connection) -> Iterator[str]:
    """Whatever a disabled account has queued or running is to be cancelled."""
    going_on = (
        select(jobs.c.id, jobs.c.account_id)
        .join(accounts, accounts.c.id == jobs.c.account_id)
        .where(accounts.c.disabled, jobs.c.state.not_in(FINAL_STATES), ~jobs.c.cancel_requested)
    )
    for row in connection.execute(going_on):
        yield f"{row.id} goes on, though {row.account_id} is disabled"


LAWS: tuple[Callable[[Connection], Iterator[str]], ...] = (
    balances_follow_from_the_ledger,
    what_is_open_is_reserved,
    a_job_shows_what_it_was_charged,
    videos_take_what_accounts_show,
    a_key_makes_one_job,
    events_tell_the_whole_story,
    the_disabled_make_nothing,
)


def break_law(engine: Engine, law: str) -> None:
    """Switch one law off, in the statements and, where it is a law there too, in the database."""
    if law == "atomic":
        event.listen(engine, "before_cursor_execute", _commit_what_came_before, insert=True)
        return
    within, replacements = _REWRITES[law]

    def rewrite(
        _connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> tuple[str, Any]:
        if within in statement:
            for before, after in replacements.items():
                statement = statement.replace(before, after)
        return statement, parameters

    event.listen(engine, "before_cursor_execute", rewrite, retval=True)
    with engine.begin() as connection:
        for statement in _IN_THE_DATABASE.get((law, connection.dialect.name), []):
            connection.exec_driver_sql(statement)


_TRUE = "'' <> "
_REWRITES = {
    "no-overdraft": ("", {"accounts.available >= ": "accounts.available + 1000000 >= "}),
    "concurrency": ("", {"accounts.open_reservations < ": "accounts.open_reservations - 99 < "}),
    "idempotency": ("", {"jobs.idempotency_key = ": "'' = "}),
    "disabled": ("SET cancel_requested", {"jobs.account_id = ": "'' = ", "jobs.id = ": "'' = "}),
    "settle-once": (
        "finished_at_ms=",
        {"jobs.lease_owner = ": _TRUE, "jobs.state = ": _TRUE},
    ),
}
_IN_THE_DATABASE = {
    ("idempotency", "sqlite"): ["DROP INDEX jobs_idempotency_key"],
    ("idempotency", "postgresql"): ["DROP INDEX jobs_idempotency_key"],
    ("settle-once", "sqlite"): [
        "DROP TABLE settlements",
        "CREATE TABLE settlements "
        "(reservation_id TEXT, confirmed BIGINT, refunded BIGINT, expired BOOLEAN)",
    ],
    ("settle-once", "postgresql"): ["ALTER TABLE settlements DROP CONSTRAINT settlements_pkey"],
}
BREAKABLE = ("atomic", *_REWRITES)


def _commit_what_came_before(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
    if statement.startswith("BEGIN"):
        return
    cursor.connection.commit()
    if connection.dialect.name == "sqlite":
        cursor.connection.execute("BEGIN IMMEDIATE")
