"""Tells webhook endpoints what became of jobs, signed as Standard Webhooks says.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import functools
import hashlib
import hmac
import json
import logging
import math
import time
from datetime import UTC, datetime

from pydantic import BaseModel, Field
from sqlalchemy import Engine
from standardwebhooks import Webhook

from deployments.database import retry_while_away
from deployments.url_guard import UrlGuardConfig, UrlRefused, guarded_stream
from jobs.outbox import Delivery, claim_delivery, mark_delivered, mark_failed
from jobs.webhooks import Endpoint

logger = logging.getLogger("ray.serve")

LEASE_MS = 60_000
POLL_S = 1.0
MINUTE_S, HOUR_S = 60.0, 3600.0


Claimed = tuple[Delivery, Endpoint]


class WebhookConfig(BaseModel, frozen=True, extra="forbid"):
    """backoff_s: the time until each further attempt; after the last one a delivery is dead.

    at_once: how many deliveries a pipeline replica sends at a time.
    """

    guard: UrlGuardConfig = UrlGuardConfig()
    backoff_s: tuple[float, ...] = (
        5.0, 5 * MINUTE_S, 30 * MINUTE_S, 2 * HOUR_S, 5 * HOUR_S, 10 * HOUR_S, 14 * HOUR_S,
        20 * HOUR_S, 24 * HOUR_S,
    )  # fmt: skip
    max_endpoints: int = Field(16, ge=0)
    at_once: int = Field(8, ge=1)


def signing_secret(pepper: bytes, endpoint_id: str, revision: int) -> str:
    """`whsec_` and 256 bits made from the pepper: it is known wherever the pepper is, and no
    table holds it.
    """
    said = f"webhook {endpoint_id} {revision}".encode()
    return f"whsec_{base64.b64encode(hmac.digest(pepper, said, hashlib.sha256)).decode()}"


async def send(
    guard: UrlGuardConfig, pepper: bytes, endpoint: Endpoint, event_id: str, body: str
) -> int:
    """POST an event and return the status; UrlRefused if none came."""
    now = datetime.now(UTC)
    revisions = [endpoint.revision]
    if endpoint.previous_until_ms > time.time() * 1000:
        revisions.append(endpoint.revision - 1)
    signatures = [
        Webhook(signing_secret(pepper, endpoint.id, revision)).sign(event_id, now, body)
        for revision in revisions
    ]
    headers = {
        "content-type": "application/json",
        "user-agent": "mutoscope-webhooks",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
    # Only the status counts; a body without end is not read.
    async with guarded_stream(
        guard, "POST", endpoint.url, content=body.encode(), headers=headers
    ) as answer:
        return answer.status_code


def event_body(event_id: str, event_type: str, job_id: str, created_at_ms: int) -> str:
    """The JSON that is sent: the same characters at every attempt."""
    content = {
        "id": event_id,
        "object": "event",
        "created_at": created_at_ms // 1000,
        "type": event_type,
        "data": {"id": job_id},
    }
    return json.dumps(content, separators=(",", ":"))


class WebhookSender:
    """Empties the outbox; any number of replicas may do so at once."""

    def __init__(self, engine: Engine, pepper: bytes, config: WebhookConfig) -> None:
        self.engine = engine
        self.pepper = pepper
        self.config = config

    async def run(self) -> None:
        """Send whatever is due, for ever."""
        sendings: set[asyncio.Task[None]] = set()
        free = asyncio.Semaphore(self.config.at_once)
        while True:
            await free.acquire()
            claimed = await retry_while_away(self.claim, for_s=math.inf)
            if claimed is None:
                free.release()
                await asyncio.sleep(POLL_S)
                continue
            sending = asyncio.create_task(self.deliver(claimed))
            sendings.add(sending)  # the loop itself would let it be collected
            sending.add_done_callback(sendings.discard)
            sending.add_done_callback(functools.partial(_finish, free))

    def claim(self) -> Claimed | None:
        """The delivery that is due the longest, if one is.

        A sender that is killed leaves it due again after LEASE_MS.
        """
        with self.engine.begin() as connection:
            return claim_delivery(connection, LEASE_MS)

    async def deliver(self, claimed: Claimed) -> None:
        """Send it once and put down what came of it.

        One whose senders died again and again, perhaps of it, is dead after as many attempts.
        """
        delivery, endpoint = claimed
        fault: str | None = "its senders died"
        if delivery.attempts <= len(self.config.backoff_s) + 1:
            fault = await self._send(delivery, endpoint)
        note = functools.partial(self._note, delivery, fault)
        await retry_while_away(note, for_s=LEASE_MS / 1000)

    def _note(self, delivery: Delivery, fault: str | None) -> None:
        with self.engine.begin() as connection:
            if fault is None:
                mark_delivered(connection, delivery)
            else:
                logger.warning("webhook %s: %s", delivery.id, fault)
                mark_failed(connection, delivery, fault, self._retry_after_ms(delivery.attempts))

    async def _send(self, delivery: Delivery, endpoint: Endpoint) -> str | None:
        """Why it was not taken, or None."""
        body = event_body(delivery.id, delivery.event_type, delivery.job_id, delivery.created_at_ms)
        try:
            status = await send(self.config.guard, self.pepper, endpoint, delivery.id, body)
        except UrlRefused as error:
            return str(error)
        return None if 200 <= status < 300 else f"status {status}"

    def _retry_after_ms(self, attempts: int) -> int | None:
        if attempts > len(self.config.backoff_s):
            return None
        return int(1000 * self.config.backoff_s[attempts - 1])


def _finish(free: asyncio.Semaphore, sending: "asyncio.Task[None]") -> None:
    """A sending that failed in itself is due again after its lease."""
    free.release()
    if not sending.cancelled() and (error := sending.exception()) is not None:
        logger.error("a webhook was not sent", exc_info=error)
