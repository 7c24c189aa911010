"""What all credits add up to, and whether accounts show what their entries say."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, func, select

from credits.accounts import accounts
from credits.ledger import EntryKind, entries


@dataclass(frozen=True, slots=True)
class Totals:
    """All credits that ever moved, by kind, and what they leave; imbalance is 0 or a fault.

    It adds up by how much each account differs, so that none makes up for another.
    """

    moved: dict[EntryKind, int]
    reserved: int
    imbalance: int


def total(connection: Connection) -> Totals:
    """Add up the whole ledger and hold what accounts show against it.

    The caller's transaction must see one state of the database throughout.
    """
    sums = select(entries.c.kind, func.sum(entries.c.amount)).group_by(entries.c.kind)
    found = {kind: int(amount) for kind, amount in connection.execute(sums)}
    moved = {kind: found.get(kind, 0) for kind in EntryKind}
    reserved, imbalance = connection.execute(_SHOWN).one()
    return Totals(moved, int(reserved), int(imbalance))


def _compare() -> Select[Any]:
    """What all accounts hold reserved, and by how much each differs from its own entries."""

    def signed(plus: Collection[EntryKind], minus: Collection[EntryKind]) -> ColumnElement[int]:
        sign = case((entries.c.kind.in_(plus), 1), (entries.c.kind.in_(minus), -1), else_=0)
        return func.sum(sign * entries.c.amount)

    back = (EntryKind.REFUND, EntryKind.EXPIRE)
    by_account = (
        select(
            entries.c.account_id,
            signed((EntryKind.GRANT, *back), (EntryKind.RESERVE,)).label("available"),
            signed((EntryKind.RESERVE,), (EntryKind.CONFIRM, *back)).label("reserved"),
            signed((EntryKind.CONFIRM,), ()).label("spent"),
        )
        .group_by(entries.c.account_id)
        .subquery()
    )
    names = ("available", "reserved", "spent")
    differences = [
        func.abs(accounts.c[name] - func.coalesce(by_account.c[name], 0)) for name in names
    ]
    return select(
        func.coalesce(func.sum(accounts.c.reserved), 0),
        func.coalesce(func.sum(differences[0] + differences[1] + differences[2]), 0),
    ).select_from(accounts.outerjoin(by_account, accounts.c.id == by_account.c.account_id))


_SHOWN = _compare()
