"""A database of an older version keeps its rows."""

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from credits.accounts import AccountId
from credits.api_keys import account_of_key
from credits.ledger import list_entries
from deployments.database import migrate, open_database
from jobs.store import get_job
from tests.conftest import read_account

ROWS = """
INSERT INTO accounts (id, name, plan, available, reserved, spent)
    VALUES ('a', 'a', 'pro', 70, 20, 10);
INSERT INTO reservations (id, account_id, amount) VALUES ('r1', 'a', 10), ('r2', 'a', 20);
INSERT INTO settlements (reservation_id, confirmed, refunded) VALUES ('r1', 10, 0);
INSERT INTO ledger_entries (account_id, debit, credit, amount, kind, reservation_id, created_at)
    VALUES ('a', 'issuer', 'a:available', 100, 'grant', NULL, '2026-01-01 00:00:00'),
           ('a', 'a:available', 'a:reserved', 10, 'reserve', 'r1', '2026-01-02 00:00:00');
INSERT INTO jobs (id, account_id, state, model, tier, priority, request, quoted, quote_exact,
                  reservation_id, created_at_ms)
    VALUES ('j2', 'a', 'queued', 'm', 'local', 1, '{}', 20, '20', 'r2', 5);
INSERT INTO jobs (id, account_id, state, model, tier, priority, request, quoted, quote_exact,
                  reservation_id, created_at_ms, charged, refunded, result)
    VALUES ('j1', 'a', 'succeeded', 'm', 'local', 1, '{}', 10, '10', 'r1', 4, 10, 0,
            '{"size_bytes": 777}');
INSERT INTO api_keys (key_hash, account_id) VALUES ('0123456789abcdef0123456789', 'a');
"""


def test_the_first_versions_rows_survive(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'old.db'}")
    migrate(engine, "0001")
    with engine.begin() as connection:
        for statement in ROWS.split(";")[:-1]:
            connection.execute(text(statement))
    migrate(engine)
    account = read_account(engine, "a")
    assert (account.available, account.reserved, account.open_reservations) == (70, 20, 1)
    assert account.stored_bytes == 777
    with engine.begin() as connection:
        entries = list_entries(connection, AccountId("a"), after=None, limit=9, ascending=True)
        owner, key, _ = account_of_key(connection, "0123456789abcdef0123456789")
        sizes = {name: get_job(connection, name).size_bytes for name in ("j1", "j2")}
        settled = connection.execute(text("SELECT expired FROM settlements")).scalar_one()
    assert [(entry.number, entry.amount, entry.kind) for entry in entries] == [
        (1, 100, "grant"),
        (2, 10, "reserve"),
    ]
    assert entries[1].created_at_ms - entries[0].created_at_ms == 86_400_000
    assert not settled
    assert (owner.id, key.account_id) == ("a", "a")
    assert sizes == {"j1": 777, "j2": None}
    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.execute(text("DELETE FROM ledger_entries"))
    engine.dispose()
