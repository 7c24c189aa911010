"""One piece of work as the database knows it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NewType

JobId = NewType("JobId", str)


class JobState(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"  # admit; also release, when a lease ends without a result
    RUNNING = "running"  # lease
    SUCCEEDED = "succeeded"  # settle, video published
    FAILED = "failed"  # settle, our fault, all refunded
    CANCELLED = "cancelled"  # settle or cancel, on the owner's request


OPEN_STATES = (JobState.QUEUED, JobState.RUNNING)
FINAL_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Phase(StrEnum):
    """What a job is doing."""

    QUEUED = "queued"
    TEXT = "text"
    DENOISE = "denoise"
    DECODE = "decode"
    MEDIA = "media"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a job; percentage 0..100. step and frame count what is finished.

    skipped: passes of the model that the steps until now made do without.
    """

    phase: Phase
    percentage: int
    step: int = 0
    num_steps: int = 0
    frame: int = 0
    num_frames: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A Progress as it was recorded: seq counts a job's events from 1; state only when final."""

    seq: int
    progress: Progress
    created_at_ms: int
    state: JobState | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. size_bytes is the video's; result is public: stage times, warnings."""

    state: JobState
    charged: int
    refunded: int
    reason: str
    video_key: str | None = None
    size_bytes: int | None = None
    result: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of jobs; the defaults are a new one's.

    Times are milliseconds since 1970 by the database's clock.
    """

    number: int
    id: JobId
    account_id: str
    state: JobState
    model: str
    tier: str
    priority: int
    request: dict[str, Any]
    quoted: int
    quote_exact: str
    reservation_id: str
    created_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    lease_owner: str | None = None
    lease_expires_at_ms: int | None = None
    attempt: int = 0
    percentage: int = 0
    cancel_requested: bool = False
    deleted: bool = False
    charged: int | None = None
    refunded: int | None = None
    reason: str | None = None
    video_key: str | None = None
    result: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None
    idempotency_key: str | None = None
    fields_hash: str | None = None
    size_bytes: int | None = None
    estimated_bytes: int = 0
    kept_ms: int | None = None
    expires_at_ms: int | None = None
    made_by_retry: bool = False
    shape: str | None = None
    num_steps: int = 0
    turn: int = 0
