"""The same request sent twice makes one job: by its Idempotency-Key, or as a client's own retry."""

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, field

from fastapi import Request
from sqlalchemy import Connection

from deployments.request_body import CreateBody
from jobs.job import Job
from jobs.store import find_by_key, find_made_by_retry, find_recent
from models.request import InvalidRequest

MAX_KEY_CHARS = 255
# The official client waits for ten minutes, twice tries again, and waits as long each time.
RETRY_WITHIN_MS = 35 * 60 * 1000
# Its retries come 0.375 s after the attempt before them, or later.
OVERTAKEN_AFTER_S = 0.25


@dataclass(frozen=True, slots=True)
class Attempt:
    """One sending of a create request.

    is_retry: the official client says so (`x-stainless-retry-count`). It sends no key, and each
    time another multipart boundary, so its retries are known by their parsed fields. arrived_s is
    by this process's monotonic clock.
    """

    fields_hash: str
    key: str | None = None
    is_retry: bool = False
    arrived_s: float = field(default_factory=time.monotonic, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether nothing says that it may have been sent before."""
        return self.key is None and not self.is_retry

    @property
    def may_be_overtaken(self) -> bool:
        """Whether a retry of it may have come by now; the official client waits longer for it."""
        return self.is_first and time.monotonic() - self.arrived_s > OVERTAKEN_AFTER_S

    def find_retry(self, connection: Connection, account_id: str) -> Job | None:
        """The job that a retry of this one has made while this one was on its way."""
        age_ms = math.ceil(1000 * (time.monotonic() - self.arrived_s))
        return find_made_by_retry(connection, account_id, self.fields_hash, age_ms)

    def find_first(self, connection: Connection, account_id: str) -> Job | None:
        """The job that an earlier sending made; IdempotencyConflict if it had other fields."""
        if self.key is not None:
            return find_by_key(connection, account_id, self.key, self.fields_hash)
        if self.is_retry:
            return find_recent(connection, account_id, self.fields_hash, RETRY_WITHIN_MS)
        return None


def read_attempt(request: Request, body: CreateBody, about: str) -> Attempt:
    """What the headers and the parsed fields say; InvalidRequest for a key that is no key.

    about: what besides its fields makes a request another one: the kind, the video it is of.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        message = f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable characters"
        raise InvalidRequest("Idempotency-Key", message)
    files = [
        _digest(body.image),
        _digest(body.video),
        *([] if body.control_reference is None else [_digest(body.control_reference)]),
        *map(_digest, body.region_masks),
        *map(str, body.schedule),
        *([] if body.mask is None else [_digest(body.mask)]),
        None if body.crop is None else str(body.crop),
    ]
    said = json.dumps([about, body.model, body.fields, files], sort_keys=True, default=str)
    retries = request.headers.get("x-stainless-retry-count", "0")
    return Attempt(
        hashlib.sha256(said.encode()).hexdigest(),
        key,
        re.fullmatch(r"0*[1-9][0-9]{0,5}", retries) is not None,
    )


def _digest(content: bytes | str | None) -> str | None:
    """A URL stands for itself: what it holds may have changed when the request is sent again."""
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content
