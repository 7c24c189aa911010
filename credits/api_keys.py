"""API keys: 256 random bits of which only a keyed hash is stored."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NewType

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    ForeignKey,
    String,
    Table,
    and_,
    bindparam,
    func,
    insert,
    or_,
    select,
    update,
)

from credits.accounts import Account, AccountId, accounts, metadata, now_ms, to_account

KeyId = NewType("KeyId", str)

SECONDS_BETWEEN_USES = 60

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("account_id", String, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("hint", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
    Column("last_used_at_ms", BigInteger),
)


class Unauthenticated(Exception):
    """No API key was given, or none of ours that is still good."""

    def __str__(self) -> str:
        return "A valid API key is needed: Authorization: Bearer mk_live_..."


class KeyNotFound(Exception):
    """No such API key, or another account's."""

    def __init__(self, key_id: str) -> None:
        super().__init__(key_id)
        self.key_id = key_id

    def __str__(self) -> str:
        return f"No API key with id {self.key_id!r}."


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; hint is its beginning. last_used_at_ms is right to a minute."""

    id: KeyId
    account_id: AccountId
    name: str
    hint: str
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None
    last_used_at_ms: int | None


def new_api_key() -> str:
    """256 random bits; only its hash is stored."""
    return f"mk_live_{secrets.token_urlsafe(32)}"


def hash_api_key(api_key: str, pepper: bytes) -> str:
    """HMAC-SHA256, so that a stolen table is of no use without the pepper."""
    return hmac.new(pepper, api_key.encode(), hashlib.sha256).hexdigest()


def add_api_key(
    connection: Connection,
    account_id: AccountId,
    api_key: str,
    pepper: bytes,
    *,
    name: str = "",
    valid_s: int | None = None,
    expires_at_ms: int | None = None,
) -> ApiKey:
    """Let one more key speak for the account: for valid_s seconds, until then, or for ever."""
    row = connection.execute(
        insert(api_keys)
        .values(
            key_hash=hash_api_key(api_key, pepper),
            id=f"key_{secrets.token_hex(12)}",
            account_id=account_id,
            name=name,
            hint=api_key[:12],
            created_at_ms=now_ms(),
            expires_at_ms=expires_at_ms if valid_s is None else now_ms() + 1000 * valid_s,
        )
        .returning(*api_keys.c)
    ).one()
    return _to_key(row._mapping)


def account_of_key(connection: Connection, key_hash: str) -> tuple[Account, ApiKey, bool]:
    """The account that a key speaks for, the key, and whether its last use on record is old.

    Unauthenticated if there is no such key, or no longer.
    """
    row = connection.execute(_ACCOUNT_OF_KEY, {"hash_given": key_hash}).first()
    if row is None:
        raise Unauthenticated
    *values, is_stale = row
    of_key = dict(zip(api_keys.c.keys(), values, strict=False))
    of_account = dict(zip(accounts.c.keys(), values[len(of_key) :], strict=True))
    return to_account(of_account), _to_key(of_key), bool(is_stale)


def check_good(connection: Connection, key_id: KeyId) -> None:
    """Unauthenticated if the key is good no longer."""
    query = select(api_keys.c.id).where(api_keys.c.id == key_id, _is_good())
    if connection.execute(query).first() is None:
        raise Unauthenticated


def is_known(connection: Connection, key_hash: str) -> bool:
    """Whether there is or ever was such a key."""
    query = select(api_keys.c.id).where(api_keys.c.key_hash == key_hash)
    return connection.execute(query).first() is not None


def note_use(connection: Connection, key_id: KeyId) -> None:
    """Put down that a key is in use."""
    connection.execute(
        update(api_keys).where(api_keys.c.id == key_id).values(last_used_at_ms=now_ms())
    )


def list_api_keys(connection: Connection, account_id: AccountId) -> list[ApiKey]:
    """All keys of an account, those that are no longer good included, the oldest first."""
    query = select(api_keys).where(api_keys.c.account_id == account_id)
    rows = connection.execute(query.order_by(api_keys.c.created_at_ms, api_keys.c.id))
    return [_to_key(row._mapping) for row in rows]


def revoke_api_key(
    connection: Connection,
    key_id: str,
    account_id: AccountId | None = None,
    *,
    only_good: bool = False,
) -> ApiKey:
    """End a key's validity at once; KeyNotFound unless it is, where given, the account's.

    only_good: KeyNotFound also for one that had ended before.
    """
    where = [api_keys.c.id == key_id]
    if only_good:
        where.append(_is_good())
    if account_id is not None:
        where.append(api_keys.c.account_id == account_id)
    row = connection.execute(
        update(api_keys)
        .where(*where)
        .values(revoked_at_ms=func.coalesce(api_keys.c.revoked_at_ms, now_ms()))
        .returning(*api_keys.c)
    ).first()
    if row is None:
        raise KeyNotFound(key_id)
    return _to_key(row._mapping)


def _is_good() -> ColumnElement[bool]:
    unexpired = or_(api_keys.c.expires_at_ms.is_(None), api_keys.c.expires_at_ms > now_ms())
    return and_(api_keys.c.revoked_at_ms.is_(None), unexpired)


# Built once: it is run for every request.
_ACCOUNT_OF_KEY = (
    select(
        api_keys,
        accounts,
        or_(
            api_keys.c.last_used_at_ms.is_(None),
            api_keys.c.last_used_at_ms <= now_ms() - 1000 * SECONDS_BETWEEN_USES,
        ),
    )
    .join(accounts, accounts.c.id == api_keys.c.account_id)
    .where(api_keys.c.key_hash == bindparam("hash_given"), _is_good())
)


def _to_key(columns: Mapping[Any, Any]) -> ApiKey:
    return ApiKey(**{name: value for name, value in columns.items() if name != "key_hash"})
