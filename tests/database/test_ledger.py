"""The laws of the ledger, each also the database's own."""

from collections.abc import Callable
from typing import NoReturn

import pytest
from sqlalchemy import Connection, Engine, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from credits import ledger
from credits.accounts import Account, AccountId, accounts
from credits.api_keys import (
    Unauthenticated,
    account_of_key,
    add_api_key,
    hash_api_key,
    new_api_key,
)
from credits.audit import note
from credits.ledger import (
    AlreadySettled,
    Hold,
    InsufficientCredits,
    ReservationId,
    entries,
    list_entries,
    new_reservation_id,
    reserve,
    settle,
    settlements,
)
from credits.plans import TooManyJobs
from credits.pricing import Credits
from deployments.database import reader
from tests.conftest import PEPPER, read_account

AnAccount = Callable[..., Account]


def balances_from_entries(engine: Engine, account_id: str) -> tuple[int, int]:
    """What the rows alone add up to: available, reserved."""
    with engine.connect() as connection:
        found = []
        for name in (f"{account_id}:available", f"{account_id}:reserved"):
            credit, debit = (
                connection.execute(
                    select(func.coalesce(func.sum(entries.c.amount), 0)).where(column == name)
                ).scalar_one()
                for column in (entries.c.credit, entries.c.debit)
            )
            found.append(int(credit - debit))
    return found[0], found[1]


def reserve_now(
    engine: Engine, account: Account, amount: int, max_open: int = 100
) -> ReservationId:
    reservation_id = new_reservation_id()
    with engine.begin() as connection:
        reserve(connection, Hold(account.id, reservation_id, Credits(amount), max_open))
    return reservation_id


def settle_now(engine: Engine, reservation: ReservationId, confirmed: int) -> Credits:
    with engine.begin() as connection:
        return settle(connection, reservation, Credits(confirmed))


def test_reserving_and_settling_conserve_credits(engine: Engine, an_account: AnAccount) -> None:
    account = an_account(credits=100)
    first, second = (reserve_now(engine, account, amount) for amount in (60, 30))
    assert read_account(engine, account.id).available == 10
    assert settle_now(engine, first, 45) == 15
    assert settle_now(engine, second, 0) == 30
    now = read_account(engine, account.id)
    assert (now.available, now.reserved, now.spent) == (55, 0, 45)
    assert balances_from_entries(engine, account.id) == (55, 0)


def test_more_than_available_is_refused_and_leaves_nothing(
    engine: Engine, an_account: AnAccount
) -> None:
    account = an_account(credits=10)
    with pytest.raises(InsufficientCredits) as refused:
        reserve_now(engine, account, 11)
    assert (refused.value.needed, refused.value.available) == (11, 10)
    assert balances_from_entries(engine, account.id) == (10, 0)


def test_a_reservation_settles_once(engine: Engine, an_account: AnAccount) -> None:
    account = an_account(credits=100)
    reservation = reserve_now(engine, account, 60)
    settle_now(engine, reservation, 60)
    for again in (60, 0):
        with pytest.raises(AlreadySettled):
            settle_now(engine, reservation, again)
    assert read_account(engine, account.id).spent == 60


def test_an_expired_reservation_gives_everything_back_once(
    engine: Engine, an_account: AnAccount
) -> None:
    account = an_account(credits=100)
    reservation = reserve_now(engine, account, 60)
    with engine.begin() as connection:
        assert settle(connection, reservation, Credits(0), expired=True) == 60
    with pytest.raises(AlreadySettled):
        settle_now(engine, reservation, 60)
    with reader(engine).begin() as connection:
        kinds = [
            entry.kind
            for entry in list_entries(connection, account.id, after=None, limit=10, ascending=True)
        ]
    assert kinds == ["grant", "reserve", "expire"]
    assert balances_from_entries(engine, account.id) == (100, 0)


def test_open_reservations_are_limited_before_credits_are(
    engine: Engine, an_account: AnAccount
) -> None:
    account = an_account(credits=50)
    first = reserve_now(engine, account, 20, max_open=2)
    reserve_now(engine, account, 20, max_open=2)
    with pytest.raises(TooManyJobs):
        reserve_now(engine, account, 20, max_open=2)
    settle_now(engine, first, 20)
    with pytest.raises(InsufficientCredits):
        reserve_now(engine, account, 20, max_open=2)


def test_what_came_back_before_the_refusal_is_told_is_no_lack_of_credits(
    engine: Engine, an_account: AnAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job ends between the statement that refuses and the one that reads why."""
    account = an_account(credits=50)
    first = reserve_now(engine, account, 50)
    refuse = ledger._refuse

    def refuse_later(connection: Connection, hold: Hold) -> NoReturn:
        connection.rollback()
        settle_now(engine, first, 0)
        refuse(connection, hold)

    monkeypatch.setattr(ledger, "_refuse", refuse_later)
    with pytest.raises(TooManyJobs), engine.connect() as connection:
        reserve(connection, Hold(account.id, new_reservation_id(), Credits(20), 100))


def test_a_statement_is_stable_while_entries_are_added(
    engine: Engine, an_account: AnAccount
) -> None:
    account, other = an_account(credits=100), an_account("bob")
    for _ in range(3):
        settle_now(engine, reserve_now(engine, account, 10), 10)
    reserve_now(engine, other, 1)
    with reader(engine).begin() as connection:
        newest = list_entries(connection, account.id, after=None, limit=3, ascending=False)
    reserve_now(engine, account, 10)
    with reader(engine).begin() as connection:
        older = list_entries(
            connection, account.id, after=newest[-1].number, limit=100, ascending=False
        )
    kinds = [entry.kind for entry in newest + older]
    assert kinds == ["confirm", "reserve", "confirm", "reserve", "confirm", "reserve", "grant"]


@pytest.mark.parametrize("confirmed", [-1, 61])
def test_no_more_than_the_reservation_is_charged(
    engine: Engine, an_account: AnAccount, confirmed: int
) -> None:
    reservation = reserve_now(engine, an_account(), 60)
    with pytest.raises(ValueError, match="60"):
        settle_now(engine, reservation, confirmed)


@pytest.mark.parametrize("table", ["ledger_entries", "reservations", "settlements"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET {}", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_money_rows_are_append_only_in_the_database(
    engine: Engine, an_account: AnAccount, table: str, statement: str
) -> None:
    if engine.dialect.name == "sqlite" and statement.startswith("TRUNCATE"):
        statement = "DELETE FROM {}"  # SQLite's word for it
    settle_now(engine, reserve_now(engine, an_account(), 60), 10)
    change = {"settlements": "refunded = 0"}.get(table, "amount = 1")
    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement.format(table, change)))


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("ledger_entries", "number"),
        ("ledger_entries", "reservation_id"),
        ("reservations", "id"),
        ("settlements", "reservation_id"),
        ("audit_log", "number"),
    ],
)
def test_no_insert_puts_another_money_row_in_the_place_of_one(
    engine: Engine, an_account: AnAccount, table: str, key: str
) -> None:
    """SQLite has INSERT OR REPLACE for it; PostgreSQL's words for it are an UPDATE."""
    settle_now(engine, reserve_now(engine, an_account(), 60), 60)
    with engine.begin() as connection:
        note(connection, "admin", "account.change", AccountId("alice"))
        kind = " WHERE kind = 'confirm'" if table == "ledger_entries" else ""
        row = dict(connection.execute(text(f"SELECT * FROM {table}{kind}")).one()._mapping)
    row = {name: "{}" if value == {} else value for name, value in row.items()}
    columns = [name for name in row if not (name == "number" and key != "number")]
    values = ", ".join(f":{name}" for name in columns)
    insert = f"INTO {table} ({', '.join(columns)}) VALUES ({values})"
    if engine.dialect.name == "sqlite":
        statement = f"INSERT OR REPLACE {insert}"
    else:
        keys = (
            "reservation_id, kind" if (table, key) == ("ledger_entries", "reservation_id") else key
        )
        changed = columns[-1]
        statement = f"INSERT {insert} ON CONFLICT ({keys}) DO UPDATE SET {changed} = :{changed}"
    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement), row)


@pytest.mark.parametrize(("confirmed", "refunded"), [(60, 1), (0, 59), (61, 0), (0, 0)])
def test_the_database_refuses_a_settlement_of_another_sum(
    engine: Engine, an_account: AnAccount, confirmed: int, refunded: int
) -> None:
    reservation = reserve_now(engine, an_account(), 60)
    values = {"reservation_id": reservation, "confirmed": confirmed, "refunded": refunded}
    with pytest.raises(IntegrityError, match="whole reservation"), engine.begin() as connection:
        connection.execute(insert(settlements).values(values))


def test_the_database_refuses_a_second_entry_of_a_kind(
    engine: Engine, an_account: AnAccount
) -> None:
    settle_now(engine, reserve_now(engine, an_account(), 60), 60)
    with engine.begin() as connection:
        confirm = entries.c.kind == "confirm"
        row = dict(connection.execute(select(entries).where(confirm)).one()._mapping)
    del row["number"]
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert(entries).values(row))


@pytest.mark.parametrize("column", ["available", "reserved", "spent"])
def test_the_database_refuses_a_negative_balance(
    engine: Engine, an_account: AnAccount, column: str
) -> None:
    an_account()
    with pytest.raises(IntegrityError, match="not_negative"), engine.begin() as connection:
        connection.execute(update(accounts).values({column: -1}))


def test_a_key_speaks_for_its_account_and_is_stored_as_a_hash(
    engine: Engine, an_account: AnAccount
) -> None:
    account = an_account()
    with engine.begin() as connection:
        found, _, _ = account_of_key(connection, hash_api_key("key-alice", PEPPER))
        assert found.id == account.id
        for wrong in (hash_api_key("key-alice", b"other"), hash_api_key("key-bob", PEPPER)):
            with pytest.raises(Unauthenticated):
                account_of_key(connection, wrong)
        secret = new_api_key()
        key = add_api_key(connection, account.id, secret, PEPPER)
        stored = str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert key.hint in stored
    assert secret[12:] not in stored


def test_keys_are_long_and_never_twice_the_same() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("mk_live_") and len(key) >= 51 for key in keys)
