"""The laws of the ledger, each also the database's own."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import IntegrityError

from credits.accounts import (
    Account,
    Unauthenticated,
    account_of_key,
    accounts,
    hash_api_key,
    new_api_key,
)
from credits.ledger import (
    AlreadySettled,
    InsufficientCredits,
    ReservationId,
    entries,
    reserve,
    settle,
)
from credits.pricing import Credits
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


def reserve_now(engine: Engine, account: Account, amount: int) -> ReservationId:
    with engine.begin() as connection:
        return reserve(connection, account.id, Credits(amount))


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


@pytest.mark.parametrize("confirmed", [-1, 61])
def test_no_more_than_the_reservation_is_charged(
    engine: Engine, an_account: AnAccount, confirmed: int
) -> None:
    reservation = reserve_now(engine, an_account(), 60)
    with pytest.raises(ValueError, match="60"):
        settle_now(engine, reservation, confirmed)


@pytest.mark.parametrize("table", ["ledger_entries", "reservations", "settlements"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET rowid = rowid", "DELETE FROM {}"])
def test_money_rows_are_append_only_in_the_database(
    engine: Engine, an_account: AnAccount, table: str, statement: str
) -> None:
    settle_now(engine, reserve_now(engine, an_account(), 60), 10)
    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement.format(table)))


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
        found = account_of_key(connection, hash_api_key("key-alice", PEPPER))
        assert found.id == account.id
        for wrong in (hash_api_key("key-alice", b"other"), hash_api_key("key-bob", PEPPER)):
            with pytest.raises(Unauthenticated):
                account_of_key(connection, wrong)
        stored = connection.execute(text("SELECT * FROM api_keys")).all()
    assert "key-alice" not in str(stored)


def test_keys_are_long_and_never_twice_the_same() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("mk_live_") and len(key) >= 51 for key in keys)
