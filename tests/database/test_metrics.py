"""/metrics says what the database holds."""

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, text

from credits.accounts import Account
from credits.plans import Plan
from credits.pricing import WorkWeights
from deployments.settlement import Ending, WorkDone, cancellation, settle
from jobs.job import Job, JobState
from tests.database.conftest import Door, lease_now

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]


def read(door: Door) -> dict[tuple[str, ...], float]:
    """Name and label values of each sample, by label -> its value."""
    answer = door.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_queue_jobs_and_credits_are_told(
    engine: Engine, door: Door, an_account: AnAccount, a_job: AJob
) -> None:
    alice, bob = an_account("alice"), an_account("bob", plan=Plan.PRO)
    done, running, _ = a_job(alice), a_job(alice), a_job(alice)
    a_job(bob)
    for job, ending in (
        (done, Ending(JobState.SUCCEEDED, "done", charge_work=True)),
        (running, None),
    ):
        assert lease_now(engine) is not None
        if ending is not None:
            work = WorkDone(1, 3, 13, 1)
            settle(
                engine, door.store, WorkWeights(), job, lease_owner="me", done=work, ending=ending
            )
    told = read(door)
    assert told["mutoscope_jobs", "succeeded"] == 1
    assert told["mutoscope_jobs", "running"] == 1
    assert told["mutoscope_jobs", "failed"] == 0
    assert told["mutoscope_queue_depth", "enterprise", "local"] == 1
    assert told["mutoscope_queue_depth", "pro", "local"] == 1
    assert told["mutoscope_credits_total", "grant"] == 2000
    assert told["mutoscope_credits_total", "reserve"] == 4 * 26
    assert told["mutoscope_credits_total", "confirm"] == 26
    assert told["mutoscope_credits_reserved",] == 3 * 26
    assert told["mutoscope_ledger_imbalance",] == 0
    assert told["mutoscope_lease_losses_total",] == 0


def test_a_job_that_is_leased_again_counts_as_a_loss(
    engine: Engine, door: Door, alice: Account, a_job: AJob
) -> None:
    job = a_job(alice)
    for _ in range(3):
        lease_now(engine)
        with engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET lease_expires_at_ms = 1"))
    lease_now(engine)
    assert read(door)["mutoscope_lease_losses_total",] == 3
    settle(
        engine, door.store, WorkWeights(), job, lease_owner="me", done=WorkDone(),
        ending=cancellation(),
    )  # fmt: skip
    assert read(door)["mutoscope_credits_total", "refund"] == 26


def test_an_account_that_shows_too_much_is_an_imbalance(
    engine: Engine, door: Door, alice: Account
) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE accounts SET available = available + 7"))
    assert read(door)["mutoscope_ledger_imbalance",] == 7


def test_accounts_that_differ_do_not_make_up_for_each_other(
    engine: Engine, door: Door, alice: Account, an_account: Callable[..., Account]
) -> None:
    an_account("bob")
    change = "UPDATE accounts SET available = available + {} WHERE id = '{}'"
    with engine.begin() as connection:
        for amount, account_id in ((5, "alice"), (-5, "bob")):
            connection.execute(text(change.format(amount, account_id)))
    assert read(door)["mutoscope_ledger_imbalance",] == 10
