"""The append-only, double-entry ledger.

A transfer is one immutable row: debit, credit, an amount above zero. A reservation moves credits
from what an account has available to what it has reserved; settling it is a new row in
settlements, at most one a reservation by that table's primary key, and moves them on: confirmed
to the house, refunded or expired back. The caller owns the transaction. Each act touches the
account's row last, so that the lock on a busy account is held for a statement and the COMMIT.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NewType, NoReturn

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    FetchedValue,
    ForeignKey,
    Index,
    Integer,
    Row,
    Select,
    String,
    Table,
    bindparam,
    false,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from credits.accounts import AccountDisabled, AccountId, accounts, metadata
from credits.plans import StorageFull, TooManyJobs
from credits.pricing import Credits

ReservationId = NewType("ReservationId", str)

MAX_BYTES = 2**62
ISSUER, REVENUE = "issuer", "revenue"


class EntryKind(StrEnum):
    """Why credits moved."""

    GRANT = "grant"  # issuer -> available
    RESERVE = "reserve"  # available -> reserved
    CONFIRM = "confirm"  # reserved -> revenue
    REFUND = "refund"  # reserved -> available
    EXPIRE = "expire"  # reserved -> available, of a reservation whose job nobody finished


entries = Table(
    "ledger_entries",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False),
    Column("debit", String, nullable=False),
    Column("credit", String, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("reservation_id", String, ForeignKey("reservations.id")),
    Column("created_at_ms", BigInteger, nullable=False, server_default=FetchedValue()),
    CheckConstraint("amount > 0", name="amount_above_zero"),
    CheckConstraint("debit <> credit", name="two_sides"),
    CheckConstraint(
        "kind IN ('grant', 'reserve', 'confirm', 'refund', 'expire')", name="kind_known"
    ),
    Index("ledger_entries_of_account", "account_id", "number"),
    Index("ledger_entries_of_reservation", "reservation_id", "kind", unique=True),
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
    Column("expired", Boolean, nullable=False, server_default=false()),
    CheckConstraint("confirmed >= 0 AND refunded >= 0", name="settled_not_negative"),
)


# Built once, since building them takes longer than a database takes to run them.
_AMOUNT = bindparam("held", type_=BigInteger())
_BYTES = bindparam("num_bytes", type_=BigInteger())
_ACCOUNT = bindparam("held_by", type_=String())
_RESERVATION = bindparam("reservation", type_=String())
_ENTRY = {
    "debit": bindparam("available_name", type_=String()),
    "credit": bindparam("reserved_name", type_=String()),
    "amount": _AMOUNT,
    "kind": literal("reserve"),
}
_HOLD = (
    update(accounts)
    .where(
        accounts.c.id == _ACCOUNT,
        accounts.c.available >= _AMOUNT,
        accounts.c.open_reservations < bindparam("max_open"),
        accounts.c.stored_bytes + _BYTES <= bindparam("max_bytes", type_=BigInteger()),
        ~accounts.c.disabled,
    )
    .values(
        available=accounts.c.available - _AMOUNT,
        reserved=accounts.c.reserved + _AMOUNT,
        open_reservations=accounts.c.open_reservations + 1,
        stored_bytes=accounts.c.stored_bytes + _BYTES,
    )
)
_INSERT_RESERVATION = insert(reservations).values(
    id=_RESERVATION, account_id=_ACCOUNT, amount=_AMOUNT
)
_INSERT_ENTRY = insert(entries).values(account_id=_ACCOUNT, reservation_id=_RESERVATION, **_ENTRY)


def reservation_statement(
    then: Callable[[CTE], Select[Any]], first: ColumnElement[Any] | None = None
) -> Select[Any]:
    """A whole reservation as one statement of PostgreSQL's, and what else is written with it.

    then: makes of a CTE, which has a row if the account was good for it, what is selected in the
    end. first: what is evaluated before the account's row is touched.
    """
    hold = _HOLD
    if first is not None:
        turn = select(_ACCOUNT.label("account_id"), first.label("first")).cte("turn")
        hold = _HOLD.where(accounts.c.id == turn.c.account_id)
    held = hold.returning(accounts.c.id).cte("held")
    made = (
        insert(reservations)
        .from_select(["id", "account_id", "amount"], select(_RESERVATION, held.c.id, _AMOUNT))
        .returning(reservations.c.id, reservations.c.account_id)
        .cte("made")
    )
    columns = ["account_id", "reservation_id", *_ENTRY]
    source = select(made.c.account_id, made.c.id, *_ENTRY.values())
    entry = insert(entries).from_select(columns, source, include_defaults=False).cte("entry")
    return then(held).add_cte(entry)


_RESERVE_AT_ONCE = reservation_statement(lambda held: select(held.c.id))


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


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One transfer of an account, by its place in the ledger."""

    number: int
    account_id: AccountId
    debit: str
    credit: str
    amount: Credits
    kind: EntryKind
    reservation_id: ReservationId | None
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Hold:
    """What a reservation takes of an account, and what the account may have with it.

    num_bytes is room for the job's video, of at most max_bytes for all the account's; max_open is
    how many reservations may be open, this one included.
    """

    account_id: AccountId
    reservation_id: ReservationId
    amount: Credits
    max_open: int
    num_bytes: int = 0
    max_bytes: int = MAX_BYTES


def new_reservation_id() -> ReservationId:
    """One that nobody else draws."""
    return ReservationId(uuid.uuid4().hex)


def grant(connection: Connection, account_id: AccountId, amount: Credits) -> None:
    """Give an account credits that the issuer owes from now on."""
    _transfer(connection, account_id, EntryKind.GRANT, amount, None)
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(available=accounts.c.available + amount)
    )


def reserve(connection: Connection, hold: Hold) -> None:
    """Hold credits and room for a job, as the last statement of its transaction.

    AccountDisabled, StorageFull, TooManyJobs or InsufficientCredits if the account is not good for
    it: nothing is left behind once that is rolled back. On PostgreSQL it is one statement, so that
    nobody waits for this account longer than that one and the COMMIT take.
    """
    if connection.dialect.name == "postgresql":
        reserve_with(connection, hold, _RESERVE_AT_ONCE, {})
        return
    values = _values(hold)
    connection.execute(_INSERT_RESERVATION, values)
    connection.execute(_INSERT_ENTRY, values)
    if connection.execute(_HOLD, values).rowcount != 1:
        _refuse(connection, hold)


def reserve_with(
    connection: Connection, hold: Hold, statement: Select[Any], more: Mapping[str, Any]
) -> Row[Any]:
    """`reserve`, on PostgreSQL, by a reservation_statement with more parameters; returns its row.

    It needs no transaction round it: if the account is not good for it, it writes nothing.
    """
    row = connection.execute(statement, {**_values(hold), **more}).first()
    return _refuse(connection, hold) if row is None else row


def _values(hold: Hold) -> dict[str, Any]:
    return {
        "held_by": hold.account_id,
        "reservation": hold.reservation_id,
        "held": hold.amount,
        "max_open": hold.max_open,
        "num_bytes": hold.num_bytes,
        "max_bytes": hold.max_bytes,
        "available_name": f"{hold.account_id}:available",
        "reserved_name": f"{hold.account_id}:reserved",
    }


def _refuse(connection: Connection, hold: Hold) -> NoReturn:
    """Say what the account lacks; if it lacks nothing any more, that it is to be asked again."""
    account = connection.execute(select(accounts).where(accounts.c.id == hold.account_id)).one()
    if account.disabled:
        raise AccountDisabled(hold.account_id)
    if account.stored_bytes + hold.num_bytes > hold.max_bytes:
        raise StorageFull(account.stored_bytes, hold.max_bytes)
    # What was lacking may be there by now: one of its jobs has ended meanwhile.
    if account.open_reservations >= hold.max_open or account.available >= hold.amount:
        raise TooManyJobs(hold.max_open)
    raise InsufficientCredits(hold.amount, account.available)


def settle(
    connection: Connection,
    reservation_id: ReservationId,
    confirmed: Credits,
    *,
    expired: bool = False,
    more_bytes: int = 0,
) -> Credits:
    """Charge part or all of a reservation and give back the rest, which is returned.

    expired: the rest goes back because nobody finished the job. more_bytes: by how much the video
    is longer than the room that was held for it. AlreadySettled if it was settled before;
    ValueError if confirmed is above it.
    """
    row = connection.execute(select(reservations).where(reservations.c.id == reservation_id)).one()
    if not 0 <= confirmed <= row.amount:
        raise ValueError(f"cannot confirm {confirmed} of {row.amount} reserved credits")
    refunded = Credits(row.amount - confirmed)
    try:
        connection.execute(
            insert(settlements).values(
                reservation_id=reservation_id,
                confirmed=confirmed,
                refunded=refunded,
                expired=expired,
            )
        )
    except IntegrityError as error:
        raise AlreadySettled(reservation_id) from error
    account_id = AccountId(row.account_id)
    if confirmed:
        _transfer(connection, account_id, EntryKind.CONFIRM, confirmed, reservation_id)
    if refunded:
        kind = EntryKind.EXPIRE if expired else EntryKind.REFUND
        _transfer(connection, account_id, kind, refunded, reservation_id)
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(
            reserved=accounts.c.reserved - row.amount,
            open_reservations=accounts.c.open_reservations - 1,
            stored_bytes=accounts.c.stored_bytes + more_bytes,
            available=accounts.c.available + refunded,
            spent=accounts.c.spent + confirmed,
        )
    )
    return refunded


def list_entries(
    connection: Connection, account_id: AccountId, *, after: int | None, limit: int, ascending: bool
) -> list[LedgerEntry]:
    """Up to limit of an account's transfers by age, beginning behind the one numbered `after`."""
    query = select(entries).where(entries.c.account_id == account_id)
    if after is not None:
        query = query.where(entries.c.number > after if ascending else entries.c.number < after)
    order = entries.c.number.asc() if ascending else entries.c.number.desc()
    return [
        LedgerEntry(**{**row._mapping, "kind": EntryKind(row.kind)})
        for row in connection.execute(query.order_by(order).limit(limit))
    ]


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
        EntryKind.EXPIRE: (reserved, available),
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
