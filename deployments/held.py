"""A request inside a denoiser replica, between its steps."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoscaling.step_scheduler import Block
from autoscaling.urgency import Urgency
from deployments.messages import Denoised, DenoiseWork
from parallel.plan import ParallelPlan, StepShape

if TYPE_CHECKING:
    import ray


@dataclass(eq=False, slots=True)
class Held:
    """A request that is here, running or parked. A job may be here twice while its lease moves."""

    id: str
    work: DenoiseWork
    conditioning: "ray.ObjectRef[Any]"
    shape: StepShape
    plans: dict[int, ParallelPlan]
    urgency: Urgency
    arrived_s: float
    state: "ray.ObjectRef[Any]"
    step: int
    first_step: int
    block: Block | None = None
    kills: int = 0
    unsaved_s: float = 0.0
    unsaved_steps: int = 0
    saved: bool = False
    failed: bool = False
    saving: "asyncio.Task[None] | None" = None
    moments: "asyncio.Queue[Denoised | Exception]" = field(default_factory=asyncio.Queue)

    @property
    def num_steps(self) -> int:
        """Of the whole denoise."""
        return self.work.request.num_steps

    @property
    def steps_left(self) -> int:
        """Until the latents are done."""
        return self.num_steps - self.step

    @property
    def is_open(self) -> bool:
        """There are steps to make, and nothing has failed."""
        return self.steps_left > 0 and not self.failed

    def moment(self, latents: "ray.ObjectRef[Any] | None" = None) -> Denoised:
        """Where it stands."""
        return Denoised(self.step, self.num_steps, self.step - self.first_step, latents)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits for the request, and make no further step of it."""
        self.failed = True
        self.moments.put_nowait(error)
