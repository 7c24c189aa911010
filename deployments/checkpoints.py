"""Where the denoiser keeps what a job needs to go on: one object a job, replaced as it goes."""

import asyncio
import logging
from dataclasses import dataclass

from deployments.config import DenoiserConfig
from media.object_store import ObjectNotFound, ObjectStore
from models.catalog import Model
from models.checkpoint import (
    Checkpoint,
    CheckpointUnusable,
    check_agrees,
    model_revision,
    pack,
    request_digest,
    unpack,
)
from models.request import VideoRequest
from models.tensors import ParkedState
from parallel.plan import ParallelPlan

logger = logging.getLogger("ray.serve")

CHECKPOINTS = "checkpoints/"
READ_ATTEMPTS = 3
READ_AGAIN_S = 1.0


class CheckpointUnreadable(Exception):
    """The store does not give a job's checkpoint now; it may do so later, or to another replica."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"the checkpoint of job {self.job_id} cannot be read"


@dataclass(slots=True)
class Unsaved:
    """What a kill would cost now: the steps since the last checkpoint, and the time they took."""

    seconds: float = 0.0
    steps: int = 0

    def add(self, seconds: float, steps: int = 1) -> None:
        """More of them."""
        self.seconds += seconds
        self.steps += steps

    def is_due(self, config: DenoiserConfig, next_s: float) -> bool:
        """Whether to save now; after the next step, which takes next_s, it would be too much."""
        limit = config.checkpoint_steps
        many = limit is not None and self.steps >= limit
        return many or self.seconds + next_s > config.checkpoint_s


def checkpoint_key(job_id: str) -> str:
    """Where a job's checkpoint lies."""
    return f"{CHECKPOINTS}{job_id}.safetensors"


class Checkpoints:
    """The checkpoints of one denoiser's models."""

    def __init__(self, store: ObjectStore, models: list[Model]) -> None:
        self.store = store
        self.models = {model.id: model for model in models}

    def save(
        self, job_id: str, request: VideoRequest, state: ParkedState, plan: ParallelPlan
    ) -> None:
        """Replace the job's checkpoint, whole or not at all."""
        revision = model_revision(self.models[request.model])
        checkpoint = Checkpoint(state, plan, request_digest(request), revision)
        self.store.put(checkpoint_key(job_id), pack(checkpoint))

    async def find(self, job_id: str, request: VideoRequest) -> Checkpoint | None:
        """As `load`, more than once if it has to be; CheckpointUnreadable."""
        for _ in range(READ_ATTEMPTS):
            try:
                return await asyncio.to_thread(self.load, job_id, request)
            except OSError as error:
                logger.warning("job %s: its checkpoint is not read: %s", job_id, error)
                hindrance = error
                await asyncio.sleep(READ_AGAIN_S)
        raise CheckpointUnreadable(job_id) from hindrance

    def load(self, job_id: str, request: VideoRequest) -> Checkpoint | None:
        """The job's checkpoint; None if there is none that this request and these weights made."""
        try:
            checkpoint = unpack(self.store.get(checkpoint_key(job_id)))
            check_agrees(checkpoint, request, self.models[request.model])
        except ObjectNotFound:
            return None
        except CheckpointUnusable as error:
            logger.warning("job %s starts over: %s", job_id, error)
            return None
        return checkpoint
