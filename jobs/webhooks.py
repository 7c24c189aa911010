"""Webhook endpoints: the URLs that an account wants to be told at. `jobs.outbox` holds what."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Integer,
    String,
    Table,
    func,
    insert,
    select,
    text,
    update,
)

from jobs.tables import metadata, now_ms

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),
    Column("account_id", String, nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("url", String, nullable=False),
    Column("event_types", JSON, nullable=False),
    # Secrets are made from the endpoint's id and this count; none is stored.
    Column("revision", Integer, nullable=False, server_default=text("1")),
    Column("previous_until_ms", BigInteger, nullable=False, server_default=text("0")),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)


class EventType(StrEnum):
    """What an endpoint may ask to be told."""

    COMPLETED = "video.completed"
    FAILED = "video.failed"  # cancelled ones too: the Videos API has one status for both


class EndpointNotFound(Exception):
    """No such webhook endpoint, or another account's."""

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(endpoint_id)
        self.endpoint_id = endpoint_id

    def __str__(self) -> str:
        return f"No webhook endpoint with id {self.endpoint_id!r}."


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL that an account wants to be told at. previous_until_ms: until when deliveries are
    signed by the secret before this revision's as well.
    """

    number: int
    id: str
    account_id: str
    name: str
    url: str
    event_types: list[str]
    revision: int
    previous_until_ms: int
    created_at_ms: int
    updated_at_ms: int


def create_endpoint(
    connection: Connection, account_id: str, *, name: str, url: str, event_types: Sequence[str]
) -> Endpoint:
    """Tell this URL from now on."""
    row = connection.execute(
        insert(webhook_endpoints)
        .values(
            id=f"we_{secrets.token_hex(12)}",
            account_id=account_id,
            name=name,
            url=url,
            event_types=list(event_types),
            created_at_ms=now_ms(),
            updated_at_ms=now_ms(),
        )
        .returning(*webhook_endpoints.c)
    ).one()
    return Endpoint(**row._mapping)


def count_endpoints(connection: Connection, account_id: str) -> int:
    """How many endpoints an account has."""
    query = select(func.count()).where(webhook_endpoints.c.account_id == account_id)
    return int(connection.execute(query).scalar_one())


def get_endpoint(connection: Connection, endpoint_id: str, account_id: str) -> Endpoint:
    """The account's endpoint of that id; EndpointNotFound."""
    query = select(webhook_endpoints).where(
        webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.account_id == account_id
    )
    row = connection.execute(query).first()
    if row is None:
        raise EndpointNotFound(endpoint_id)
    return Endpoint(**row._mapping)


def list_endpoints(
    connection: Connection, account_id: str, *, after: str | None, limit: int, ascending: bool
) -> list[Endpoint]:
    """Up to limit endpoints by age, beginning behind `after`; EndpointNotFound."""
    number = webhook_endpoints.c.number
    query = select(webhook_endpoints).where(webhook_endpoints.c.account_id == account_id)
    if after is not None:
        seen = get_endpoint(connection, after, account_id).number
        query = query.where(number > seen if ascending else number < seen)
    ordered = query.order_by(number.asc() if ascending else number.desc()).limit(limit)
    return [Endpoint(**row._mapping) for row in connection.execute(ordered)]


def change_endpoint(
    connection: Connection, endpoint_id: str, account_id: str, values: dict[str, Any]
) -> Endpoint:
    """Change name, url or event_types; EndpointNotFound."""
    get_endpoint(connection, endpoint_id, account_id)
    if values:
        connection.execute(
            update(webhook_endpoints)
            .where(webhook_endpoints.c.id == endpoint_id)
            .values(**values, updated_at_ms=now_ms())
        )
    return get_endpoint(connection, endpoint_id, account_id)


def rotate_endpoint(
    connection: Connection, endpoint_id: str, account_id: str, keep_previous_ms: int
) -> Endpoint:
    """Count the revision up, so that the endpoint has another secret; EndpointNotFound."""
    return change_endpoint(
        connection,
        endpoint_id,
        account_id,
        {
            "revision": webhook_endpoints.c.revision + 1,
            "previous_until_ms": now_ms() + keep_previous_ms,
        },
    )
