"""Accounts: whose the credits are, and on which plan."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NewType

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    false,
    func,
    insert,
    select,
    text,
    tuple_,
    update,
)

from credits.plans import Plan
from credits.pricing import Credits

AccountId = NewType("AccountId", str)

metadata = MetaData()

accounts = Table(
    "accounts",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("plan", String, nullable=False),
    # What the ledger's rows add up to; the constraints refuse an overdraft whatever code runs.
    Column("available", BigInteger, nullable=False, server_default=text("0")),
    Column("reserved", BigInteger, nullable=False, server_default=text("0")),
    Column("spent", BigInteger, nullable=False, server_default=text("0")),
    Column("max_jobs", Integer),
    Column("open_reservations", Integer, nullable=False, server_default=text("0")),
    # What the account's videos take, those that are still to be made by their estimates.
    Column("stored_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("disabled", Boolean, nullable=False, server_default=false()),
    Column("created_at_ms", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint("available >= 0", name="available_not_negative"),
    CheckConstraint("reserved >= 0", name="reserved_not_negative"),
    CheckConstraint("spent >= 0", name="spent_not_negative"),
    CheckConstraint("open_reservations >= 0", name="open_reservations_not_negative"),
)


class AccountNotFound(Exception):
    """No such account."""

    def __init__(self, account_id: str) -> None:
        super().__init__(account_id)
        self.account_id = account_id

    def __str__(self) -> str:
        return f"No account with id {self.account_id!r}."


class AccountDisabled(Exception):
    """The account may make no more videos until an admin enables it."""

    def __init__(self, account_id: str) -> None:
        super().__init__(account_id)
        self.account_id = account_id

    def __str__(self) -> str:
        return "This account is disabled."


@dataclass(frozen=True, slots=True)
class Account:
    """An account as it stands; max_jobs, when set, replaces its plan's limit."""

    id: AccountId
    name: str
    plan: Plan
    available: Credits
    reserved: Credits
    spent: Credits
    max_jobs: int | None
    open_reservations: int
    stored_bytes: int
    disabled: bool
    created_at_ms: int


def new_account_id() -> AccountId:
    """One that nobody else draws."""
    return AccountId(f"acct_{secrets.token_hex(12)}")


def create_account(connection: Connection, account_id: AccountId, name: str, plan: Plan) -> None:
    """Insert an account without credits and without keys."""
    connection.execute(
        insert(accounts).values(id=account_id, name=name, plan=plan, created_at_ms=now_ms())
    )


def find_account(connection: Connection, account_id: AccountId) -> Account | None:
    """The account of that id, if there is one."""
    row = connection.execute(select(accounts).where(accounts.c.id == account_id)).first()
    return None if row is None else to_account(row._mapping)


def get_account(connection: Connection, account_id: str) -> Account:
    """The account of that id; AccountNotFound."""
    account = find_account(connection, AccountId(account_id))
    if account is None:
        raise AccountNotFound(account_id)
    return account


def list_accounts(
    connection: Connection, *, after: str | None, limit: int, ascending: bool
) -> list[Account]:
    """Up to limit accounts by age, beginning behind `after`; AccountNotFound."""
    age = tuple_(accounts.c.created_at_ms, accounts.c.id)
    query = select(accounts)
    if after is not None:
        account = get_account(connection, after)
        seen = tuple_(account.created_at_ms, account.id)
        query = query.where(age > seen if ascending else age < seen)
    columns = (accounts.c.created_at_ms, accounts.c.id)
    order = columns if ascending else [column.desc() for column in columns]
    return [
        to_account(row._mapping) for row in connection.execute(query.order_by(*order).limit(limit))
    ]


def plans_of(connection: Connection, account_ids: Collection[str]) -> dict[str, Plan]:
    """The plan of each of these accounts."""
    query = select(accounts.c.id, accounts.c.plan).where(accounts.c.id.in_(account_ids))
    return {row.id: Plan(row.plan) for row in connection.execute(query)}


def change_account(connection: Connection, account_id: str, values: dict[str, Any]) -> Account:
    """Change plan, max_jobs (None: as the plan says) or disabled; AccountNotFound."""
    if values:
        connection.execute(update(accounts).where(accounts.c.id == account_id).values(values))
    return get_account(connection, account_id)


def release_bytes(connection: Connection, account_id: str, num_bytes: int) -> None:
    """Videos of that length are deleted."""
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(stored_bytes=accounts.c.stored_bytes - num_bytes)
    )


def to_account(columns: Mapping[Any, Any]) -> Account:
    """A row of `accounts`, by column name, as an Account."""
    return Account(**{**columns, "plan": Plan(columns["plan"])})


def now_ms() -> ColumnElement[int]:
    """The database's clock, in milliseconds since 1970."""
    return func.now_ms(type_=BigInteger())
