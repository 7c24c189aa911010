"""A denoise under way as one safetensors file with its JSON: all that a resume needs.

No torch here: whoever keeps checkpoints has no model.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from models.catalog import Model
from models.request import VideoRequest
from models.tensors import ParkedState
from parallel.plan import ParallelPlan

FORMAT = "mutoscope-denoise-1"


class CheckpointUnusable(Exception):
    """A checkpoint is damaged, or was made for another request or with other weights."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the checkpoint cannot be used: {self.reason}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A parked state; the plan of its last step; SHA-256 of the request and of the model."""

    state: ParkedState
    plan: ParallelPlan
    request: str
    revision: str


def request_digest(request: VideoRequest) -> str:
    """SHA-256 of all that was asked; a field that a later version adds changes none."""
    asked = request.model_dump_json(exclude_defaults=True)
    return hashlib.sha256(asked.encode()).hexdigest()


def model_revision(model: Model) -> str:
    """SHA-256 of the manifest, which holds those of every file, and of what is beside it."""
    beside = "".join(f"{part.id} {part.sha256}\n" for part in model.additions)
    manifest = model.manifest.told_by_publisher()
    return hashlib.sha256(f"{manifest}{beside}".encode()).hexdigest()


def pack(checkpoint: Checkpoint) -> bytes:
    """The file's content; the JSON is the metadata of its header."""
    state = checkpoint.state
    tensors: dict[str, Any] = {
        "latents": np.ascontiguousarray(state.latents),
        "generator": np.ascontiguousarray(state.generator),
    }
    for part, values in (("scheduler", state.scheduler), ("cache", state.cache)):
        for name, value in values.items():
            tensors[f"{part}.{name}"] = np.ascontiguousarray(value)
    about = {
        "format": FORMAT,
        "step": state.step,
        "num_steps": state.num_steps,
        "skipped": state.skipped,
        "plan": asdict(checkpoint.plan),
        "request": checkpoint.request,
        "revision": checkpoint.revision,
    }
    return save(tensors, metadata={"checkpoint": json.dumps(about)})


def unpack(content: bytes) -> Checkpoint:
    """CheckpointUnusable if it is none of ours, or not whole."""
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["checkpoint"])
        if about["format"] != FORMAT:
            raise CheckpointUnusable(f"its format is {about['format']!r}, not {FORMAT!r}")
        return Checkpoint(
            ParkedState(
                latents=tensors["latents"],
                step=about["step"],
                num_steps=about["num_steps"],
                generator=tensors["generator"],
                scheduler=_part(tensors, "scheduler"),
                cache=_part(tensors, "cache"),
                skipped=about.get("skipped", 0),  # older ones do not tell
            ),
            ParallelPlan(**about["plan"]),
            about["request"],
            about["revision"],
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointUnusable(str(error)) from error


def _part(tensors: dict[str, Any], part: str) -> dict[str, Any]:
    """Those of a part, by their names in it."""
    return {
        name.removeprefix(f"{part}."): value
        for name, value in tensors.items()
        if name.startswith(f"{part}.")
    }


def check_agrees(checkpoint: Checkpoint, request: VideoRequest, model: Model) -> None:
    """CheckpointUnusable if it was made for another request or with other weights."""
    if checkpoint.request != request_digest(request):
        raise CheckpointUnusable("it was made for another request")
    if checkpoint.revision != model_revision(model):
        raise CheckpointUnusable(f"the weights of {model.id} have changed since")
