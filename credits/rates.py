"""How many requests a key may make: the generic cell rate algorithm, one row a key.

GCRA (ITU-T I.371) keeps one number, the moment at which the key's allowance is whole again. Every
replica counts in the same row.
"""

import math
from dataclasses import dataclass

from pydantic import BaseModel, Field
from sqlalchemy import BigInteger, Column, Connection, ForeignKey, String, Table, case, select, text
from sqlalchemy.dialects import postgresql, sqlite

from credits.accounts import metadata, now_ms
from credits.api_keys import KeyId

request_rates = Table(
    "request_rates",
    metadata,
    Column("key_id", String, ForeignKey("api_keys.id"), primary_key=True),
    Column("whole_at_us", BigInteger, nullable=False),
)


class RequestRate(BaseModel, frozen=True, extra="forbid"):
    """per_s requests a second in the long run, and burst at once after a rest."""

    per_s: float = Field(20.0, gt=0, le=10_000)
    burst: int = Field(100, ge=1)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key has left after a request: requests at once, and the time until it has all."""

    limit: int
    remaining: int
    whole_after_s: float


class RateLimited(Exception):
    """The key makes requests faster than its plan allows."""

    def __init__(self, limit: int, retry_after_s: float, whole_after_s: float) -> None:
        super().__init__(limit, retry_after_s, whole_after_s)
        self.retry_after_s = float(retry_after_s)
        self.allowance = Allowance(int(limit), 0, float(whole_after_s))

    def __str__(self) -> str:
        return f"too many requests: try again in {self.retry_after_s:.3g} s"


def take_request(connection: Connection, key_id: KeyId, rate: RequestRate) -> Allowance:
    """Count one request; RateLimited, which counts nothing, if it is one too many.

    A crash may forget the last requests: on PostgreSQL the commit waits for no disk.
    """
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql:
        connection.execute(text("SET LOCAL synchronous_commit TO off"))
    interval_us = round(1_000_000 / rate.per_s)
    now_us = now_ms() * 1000
    whole_at_us = request_rates.c.whole_at_us
    insert = postgresql.insert if is_postgresql else sqlite.insert
    row = connection.execute(
        insert(request_rates)
        .values(key_id=key_id, whole_at_us=now_us + interval_us)
        .on_conflict_do_update(
            index_elements=["key_id"],
            set_={
                "whole_at_us": interval_us + case((whole_at_us > now_us, whole_at_us), else_=now_us)
            },
            where=whole_at_us <= now_us + (rate.burst - 1) * interval_us,
        )
        .returning((whole_at_us - now_us).label("after_us"))
    ).first()
    if row is not None:
        remaining = min(rate.burst - math.ceil(row.after_us / interval_us), rate.burst - 1)
        return Allowance(rate.burst, max(remaining, 0), max(row.after_us, 0) / 1e6)
    query = select(whole_at_us - now_us).where(request_rates.c.key_id == key_id)
    after_us = max(connection.execute(query).scalar_one(), 0)
    retry_after_us = max(after_us - (rate.burst - 1) * interval_us, 0)
    raise RateLimited(rate.burst, retry_after_us / 1e6, after_us / 1e6)
