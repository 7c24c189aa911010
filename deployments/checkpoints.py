"""Where the denoiser keeps what a job needs to go on: one object a job, replaced as it goes."""

import logging

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
