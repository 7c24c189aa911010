"""Accounts and the API keys that speak for them."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import NewType

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    insert,
    select,
    text,
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
    CheckConstraint("available >= 0", name="available_not_negative"),
    CheckConstraint("reserved >= 0", name="reserved_not_negative"),
    CheckConstraint("spent >= 0", name="spent_not_negative"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String, primary_key=True),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False, index=True),
)


class Unauthenticated(Exception):
    """No API key was given, or none of ours."""

    def __str__(self) -> str:
        return "A valid API key is needed: Authorization: Bearer mk_live_..."


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


def new_api_key() -> str:
    """256 random bits; only its hash is stored."""
    return f"mk_live_{secrets.token_urlsafe(32)}"


def hash_api_key(api_key: str, pepper: bytes) -> str:
    """HMAC-SHA256, so that a stolen table is of no use without the pepper."""
    return hmac.new(pepper, api_key.encode(), hashlib.sha256).hexdigest()


def create_account(
    connection: Connection, account_id: AccountId, name: str, plan: Plan, key_hash: str
) -> None:
    """Insert an account without credits and its first key."""
    connection.execute(insert(accounts).values(id=account_id, name=name, plan=plan))
    add_api_key(connection, account_id, key_hash)


def add_api_key(connection: Connection, account_id: AccountId, key_hash: str) -> None:
    """Let one more key speak for the account."""
    connection.execute(insert(api_keys).values(key_hash=key_hash, account_id=account_id))


def account_of_key(connection: Connection, key_hash: str) -> Account:
    """The account that a key speaks for; Unauthenticated if there is none."""
    query = select(accounts).join(api_keys).where(api_keys.c.key_hash == key_hash)
    row = connection.execute(query).first()
    if row is None:
        raise Unauthenticated
    return Account(**{**row._mapping, "plan": Plan(row.plan)})


def find_account(connection: Connection, account_id: AccountId) -> Account | None:
    """The account of that id, if there is one."""
    row = connection.execute(select(accounts).where(accounts.c.id == account_id)).first()
    return None if row is None else Account(**{**row._mapping, "plan": Plan(row.plan)})
