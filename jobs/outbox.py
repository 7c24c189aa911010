"""The outbox: what is still to be told to webhook endpoints, and what became of the rest.

A delivery is put into it by the transaction that ends its job, so that none is lost; it is sent at
least once, each time under the same id, by which a receiver knows a repetition.
"""

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    Row,
    String,
    Table,
    delete,
    insert,
    select,
    text,
    update,
)

from jobs.job import JobState
from jobs.tables import jobs, metadata, now_ms
from jobs.webhooks import Endpoint, EventType, get_endpoint, webhook_endpoints

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),
    Column("endpoint_id", String, ForeignKey("webhook_endpoints.id"), nullable=False, index=True),
    Column("job_id", String, ForeignKey("jobs.id"), nullable=False),
    Column("event_type", String, nullable=False),
    Column("state", String, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_at_ms", BigInteger, nullable=False),
    Column("last_error", String),
    Column("created_at_ms", BigInteger, nullable=False),
    Index("webhook_deliveries_due", "state", "next_at_ms"),
)


class DeliveryState(StrEnum):
    """Where a delivery stands; a dead one is sent again only when its owner asks."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class DeliveryNotFound(Exception):
    """No such webhook delivery, or another account's."""

    def __init__(self, delivery_id: str) -> None:
        super().__init__(delivery_id)
        self.delivery_id = delivery_id

    def __str__(self) -> str:
        return f"No webhook delivery with id {self.delivery_id!r}."


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one endpoint; id is the `webhook-id` that it is sent under."""

    number: int
    id: str
    endpoint_id: str
    job_id: str
    event_type: EventType
    state: DeliveryState
    attempts: int
    next_at_ms: int
    last_error: str | None
    created_at_ms: int


def announce(connection: Connection, job_id: str, state: JobState) -> None:
    """Put the end of a job into the outbox, in the transaction that ends it."""
    event_type = EventType.COMPLETED if state is JobState.SUCCEEDED else EventType.FAILED
    query = (
        select(webhook_endpoints.c.id, webhook_endpoints.c.event_types)
        .join(jobs, jobs.c.account_id == webhook_endpoints.c.account_id)
        .where(jobs.c.id == job_id)
        # One that is being deleted is waited for, and is then not there.
        .with_for_update(read=True, key_share=True, of=webhook_endpoints)
    )
    deliveries = [
        {
            "id": f"evt_{secrets.token_hex(12)}",
            "endpoint_id": row.id,
            "job_id": job_id,
            "event_type": event_type,
            "state": DeliveryState.PENDING,
        }
        for row in connection.execute(query)
        if event_type in row.event_types
    ]
    for values in deliveries:
        connection.execute(
            insert(webhook_deliveries).values(**values, next_at_ms=now_ms(), created_at_ms=now_ms())
        )


def delete_endpoint(connection: Connection, endpoint_id: str, account_id: str) -> None:
    """Forget an endpoint and all that was or is to be told to it; EndpointNotFound."""
    get_endpoint(connection, endpoint_id, account_id)
    of_it = webhook_endpoints.c.id == endpoint_id
    connection.execute(select(webhook_endpoints.c.id).where(of_it).with_for_update())
    connection.execute(
        delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id)
    )
    connection.execute(delete(webhook_endpoints).where(of_it))


def claim_delivery(connection: Connection, retry_after_ms: int) -> tuple[Delivery, Endpoint] | None:
    """Take the delivery that is due the longest; it is due again after retry_after_ms.

    The attempt is counted now: one whose sender is killed was one.
    """
    due = (
        select(webhook_deliveries.c.number)
        .where(
            webhook_deliveries.c.state == DeliveryState.PENDING,
            webhook_deliveries.c.next_at_ms <= now_ms(),
        )
        .order_by(webhook_deliveries.c.next_at_ms)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = connection.execute(
        update(webhook_deliveries)
        .where(webhook_deliveries.c.number == due.scalar_subquery())
        .values(attempts=webhook_deliveries.c.attempts + 1, next_at_ms=now_ms() + retry_after_ms)
        .returning(*webhook_deliveries.c)
    ).first()
    if row is None:
        return None
    endpoint = connection.execute(
        select(webhook_endpoints).where(webhook_endpoints.c.id == row.endpoint_id)
    ).one()
    return _to_delivery(row), Endpoint(**endpoint._mapping)


def mark_delivered(connection: Connection, delivery: Delivery) -> None:
    """The endpoint has taken it."""
    _change_delivery(connection, delivery.id, state=DeliveryState.DELIVERED, last_error=None)


def mark_failed(
    connection: Connection, delivery: Delivery, error: str, retry_after_ms: int | None
) -> None:
    """The endpoint has not taken it: try again after so long, or never if None."""
    if retry_after_ms is None:
        _change_delivery(connection, delivery.id, state=DeliveryState.DEAD, last_error=error)
    else:
        again_ms = now_ms() + retry_after_ms
        _change_delivery(connection, delivery.id, next_at_ms=again_ms, last_error=error)


def retry_delivery(connection: Connection, delivery_id: str, account_id: str) -> Delivery:
    """Send it anew, whatever became of it; DeliveryNotFound."""
    _get_delivery(connection, delivery_id, account_id)
    _change_delivery(
        connection, delivery_id, state=DeliveryState.PENDING, attempts=0, next_at_ms=now_ms()
    )
    return _get_delivery(connection, delivery_id, account_id)


def list_deliveries(
    connection: Connection,
    account_id: str,
    state: DeliveryState | None,
    *,
    after: str | None,
    limit: int,
    ascending: bool,
) -> list[Delivery]:
    """Up to limit of an account's deliveries by age, behind `after`; DeliveryNotFound."""
    number = webhook_deliveries.c.number
    query = _deliveries_of(account_id)
    if state is not None:
        query = query.where(webhook_deliveries.c.state == state)
    if after is not None:
        seen = _get_delivery(connection, after, account_id).number
        query = query.where(number > seen if ascending else number < seen)
    ordered = query.order_by(number.asc() if ascending else number.desc()).limit(limit)
    return [_to_delivery(row) for row in connection.execute(ordered)]


def _deliveries_of(account_id: str) -> Any:
    return (
        select(webhook_deliveries)
        .join(webhook_endpoints, webhook_endpoints.c.id == webhook_deliveries.c.endpoint_id)
        .where(webhook_endpoints.c.account_id == account_id)
    )


def _get_delivery(connection: Connection, delivery_id: str, account_id: str) -> Delivery:
    query = _deliveries_of(account_id).where(webhook_deliveries.c.id == delivery_id)
    row = connection.execute(query).first()
    if row is None:
        raise DeliveryNotFound(delivery_id)
    return _to_delivery(row)


def _change_delivery(connection: Connection, delivery_id: str, **values: Any) -> None:
    connection.execute(
        update(webhook_deliveries).where(webhook_deliveries.c.id == delivery_id).values(**values)
    )


def _to_delivery(row: Row[Any]) -> Delivery:
    return Delivery(
        **{
            **row._mapping,
            "event_type": EventType(row.event_type),
            "state": DeliveryState(row.state),
        }
    )
