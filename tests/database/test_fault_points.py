"""Whatever dies at whatever statement: one job, one settlement, one charge, nothing reserved."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from bench import life
from bench.fault_points import DIED, run_points
from bench.life import STEPS
from credits.ledger import ReservationId
from credits.ledger import settle as settle_reservation
from credits.pricing import Credits
from jobs.job import Job, Outcome
from jobs.store import finish
from models.catalog import Model

MONEY = [step for step in STEPS if step.name in ("admit", "settle")]


def died_on(url: str) -> tuple[str, ...]:
    """A connection to SQLite is the process's own file handle: nobody else can end it."""
    return DIED[:1] if url.startswith("sqlite") else DIED


def test_admitting_and_settling_survive_every_death(
    engine: Engine, database_url: str, tmp_path: Path, model: Model
) -> None:
    rows = [
        row
        for died in died_on(database_url)
        for row in run_points(database_url, tmp_path / "store", model, died, MONEY)
    ]
    assert len(rows) >= 20
    assert [row for row in rows if row.faults] == []


@pytest.mark.long
def test_a_jobs_whole_life_survives_every_death(
    engine: Engine, database_url: str, tmp_path: Path, model: Model
) -> None:
    rows = [
        row
        for died in died_on(database_url)
        for row in run_points(database_url, tmp_path / "store", model, died)
    ]
    assert len(rows) >= 100
    assert [row for row in rows if row.faults] == []


def test_a_settlement_in_two_transactions_is_found_out(
    engine: Engine, database_url: str, tmp_path: Path, model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def settle_twice_over(
        engine: Engine, _store: Any, _weights: Any, job: Job, *, lease_owner: str, ending: Any,
        **_: Any,
    ) -> None:  # fmt: skip
        outcome = Outcome(ending.state, job.quoted, 0, "", video_key=ending.video_key)
        with engine.begin() as connection:
            finish(connection, job.id, lease_owner=lease_owner, outcome=outcome)
        with engine.begin() as connection:
            reservation_id = ReservationId(job.reservation_id)
            settle_reservation(connection, reservation_id, Credits(job.quoted))

    monkeypatch.setattr(life, "settle", settle_twice_over)
    settling = [step for step in STEPS if step.name == "settle"]
    rows = run_points(database_url, tmp_path / "store", model, "process", settling)
    assert any("0 settlements" in row.faults for row in rows)
