"""The audit log: who changed which account, and how; append-only like the ledger."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Integer,
    String,
    Table,
    insert,
    select,
)

from credits.accounts import AccountId, metadata, now_ms

audit_log = Table(
    "audit_log",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("details", JSON, nullable=False),
)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """actor: "admin", or the id of the account that acted for itself."""

    number: int
    created_at_ms: int
    actor: str
    action: str
    account_id: AccountId
    details: dict[str, Any]


def note(
    connection: Connection, actor: str, action: str, account_id: AccountId, **details: Any
) -> None:
    """Put down an act, in the transaction that does it."""
    connection.execute(
        insert(audit_log).values(
            created_at_ms=now_ms(),
            actor=actor,
            action=action,
            account_id=account_id,
            details=details,
        )
    )


def list_audit(
    connection: Connection,
    *,
    account_id: str | None,
    after: int | None,
    limit: int,
    ascending: bool,
) -> list[AuditEntry]:
    """Up to limit acts by age, of one account or of all, beginning behind the one numbered."""
    number = audit_log.c.number
    query = select(audit_log).order_by(number.asc() if ascending else number.desc()).limit(limit)
    if account_id is not None:
        query = query.where(audit_log.c.account_id == account_id)
    if after is not None:
        query = query.where(number > after if ascending else number < after)
    return [AuditEntry(**row._mapping) for row in connection.execute(query)]
