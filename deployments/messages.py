"""What the stages tell the pipeline; large arrays go by reference, never through it."""

from dataclasses import dataclass
from typing import Any

from ray import ObjectRef

from models.request import VideoRequest


@dataclass(frozen=True, slots=True)
class Encoded:
    """A reference to the Conditioning; num_tokens counts the prompt's before truncation.

    made: whether any of it had to be encoded, and was not there from a request before.
    """

    conditioning: "ObjectRef[Any]"
    num_tokens: int
    max_tokens: int
    made: bool


@dataclass(frozen=True, slots=True)
class DenoiseWork:
    """A job to be denoised; priority is its plan's, queued_s how long ago it was admitted.

    lease: which of the job's leases asks for it; they are counted up.
    """

    job_id: str
    priority: int
    queued_s: float
    request: VideoRequest
    lease: int = 1


@dataclass(frozen=True, slots=True)
class Denoised:
    """One denoise step done; num_made counts those that were made since the job's first.

    skipped: passes of the model that these made do without. A changed video begins later than at
    step 0. degree: the ranks that made it, in step_s seconds; None: it tells nothing of others. The
    last carries a reference to the latents, float32 [1, C, F, H, W].
    """

    step: int
    num_steps: int
    num_made: int
    skipped: int
    latents: "ObjectRef[Any] | None"
    degree: int = 1
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """Frames decoded and written so far."""

    frame: int
    num_frames: int


@dataclass(frozen=True, slots=True)
class Published:
    """A video in the object store, with the seconds spent waiting for frames and encoding."""

    key: str
    size_bytes: int
    decode_s: float
    media_s: float
