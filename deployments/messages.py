"""What the stages tell the pipeline; large arrays go by reference, never through it."""

from dataclasses import dataclass
from typing import Any

from ray import ObjectRef


@dataclass(frozen=True, slots=True)
class Encoded:
    """A reference to the Conditioning; num_tokens counts the prompt's before truncation."""

    conditioning: "ObjectRef[Any]"
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Denoised:
    """One denoise step done; the last carries a reference to the latents [1, C, F, H, W]."""

    step: int
    num_steps: int
    latents: "ObjectRef[Any] | None"


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
