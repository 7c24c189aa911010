"""The append-only, double-entry ledger.

A transfer is one immutable row: debit, credit, an amount above zero. A reservation moves credits
from what an account has available to what it has reserved; settling it is a new row in
settlements, at most one a reservation by that table's primary key, and moves them on: confirmed
to the house, refunded back. The caller owns the transaction.
"""

import uuid
from enum import StrEnum
from typing import NewType

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    Integer,
    String,
    Table,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError

from credits.accounts import AccountId, accounts, metadata
from credits.pricing import Credits

ReservationId = NewType("ReservationId", str)

ISSUER, REVENUE = "issuer", "revenue"


class EntryKind(StrEnum):
    """Why credits moved."""

    GRANT = "grant"  # issuer -> available
    RESERVE = "reserve"  # available -> reserved
    CONFIRM = "confirm"  # reserved -> revenue
    REFUND = "refund"  # reserved -> available


entries = Table(
    "ledger_entries",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("debit", String, nullable=False),
    Column("credit", String, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("reservation_id", String, ForeignKey("reservations.id"), index=True),
    Column("created_at", String, nullable=False, server_default=text("CURRENT_TIMESTAMP")),
    CheckConstraint("amount > 0", name="amount_above_zero"),
    CheckConstraint("debit <> credit", name="two_sides"),
    CheckConstraint("kind IN ('grant', 'reserve', 'confirm', 'refund')", name="kind_known"),
)

reservations = Table(
    "reservations",
    metadata,
    Column("id", String, primary_key=True),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    CheckConstraint("amount > 0", name="reservation_above_zero"),
)

settlements = Table(
    "settlements",
    metadata,
    Column("reservation_id", String, ForeignKey("reservations.id"), primary_key=True),
    Column("confirmed", BigInteger, nullable=False),
    Column("refunded", BigInteger, nullable=False),
    CheckConstraint("confirmed >= 0 AND refunded >= 0", name="settled_not_negative"),
)


class InsufficientCredits(Exception):
    """The price is above the credits available."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available

    def __str__(self) -> str:
        return f"{self.needed} credits needed, {self.available} available"


class AlreadySettled(Exception):
    """A reservation settles once."""

    def __init__(self, reservation_id: str) -> None:
        super().__init__(reservation_id)
        self.reservation_id = reservation_id

    def __str__(self) -> str:
        return f"reservation {self.reservation_id} is settled already"


def grant(connection: Connection, account_id: AccountId, amount: Credits) -> None:
    """Give an account credits that the issuer owes from now on."""
    _transfer(connection, account_id, EntryKind.GRANT, amount, None)
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(available=accounts.c.available + amount)
    )


def reserve(connection: Connection, account_id: AccountId, amount: Credits) -> ReservationId:
    """Hold credits for a job; InsufficientCredits leaves nothing behind once rolled back."""
    reservation_id = ReservationId(uuid.uuid4().hex)
    connection.execute(
        insert(reservations).values(id=reservation_id, account_id=account_id, amount=amount)
    )
    _transfer(connection, account_id, EntryKind.RESERVE, amount, reservation_id)
    held = connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id, accounts.c.available >= amount)
        .values(available=accounts.c.available - amount, reserved=accounts.c.reserved + amount)
    )
    if held.rowcount != 1:
        available = connection.execute(
            select(accounts.c.available).where(accounts.c.id == account_id)
        ).scalar_one()
        raise InsufficientCredits(amount, available)
    return reservation_id


def settle(connection: Connection, reservation_id: ReservationId, confirmed: Credits) -> Credits:
    """Charge part or all of a reservation and give back the rest, which is returned.

    AlreadySettled if it was settled before; ValueError if confirmed is above it.
    """
    row = connection.execute(select(reservations).where(reservations.c.id == reservation_id)).one()
    if not 0 <= confirmed <= row.amount:
        raise ValueError(f"cannot confirm {confirmed} of {row.amount} reserved credits")
    refunded = Credits(row.amount - confirmed)
    try:
        connection.execute(
            insert(settlements).values(
                reservation_id=reservation_id, confirmed=confirmed, refunded=refunded
            )
        )
    except IntegrityError as error:
        raise AlreadySettled(reservation_id) from error
    account_id = AccountId(row.account_id)
    if confirmed:
        _transfer(connection, account_id, EntryKind.CONFIRM, confirmed, reservation_id)
    if refunded:
        _transfer(connection, account_id, EntryKind.REFUND, refunded, reservation_id)
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(
            reserved=accounts.c.reserved - row.amount,
            available=accounts.c.available + refunded,
            spent=accounts.c.spent + confirmed,
        )
    )
    return refunded


def _transfer(
    connection: Connection,
    account_id: AccountId,
    kind: EntryKind,
    amount: Credits,
    reservation_id: ReservationId | None,
) -> None:
    available, reserved = f"{account_id}:available", f"{account_id}:reserved"
    debit, credit = {
        EntryKind.GRANT: (ISSUER, available),
        EntryKind.RESERVE: (available, reserved),
        EntryKind.CONFIRM: (reserved, REVENUE),
        EntryKind.REFUND: (reserved, available),
    }[kind]
    connection.execute(
        insert(entries).values(
            account_id=account_id,
            debit=debit,
            credit=credit,
            amount=amount,
            kind=kind,
            reservation_id=reservation_id,
        )
    )
