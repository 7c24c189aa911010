"""A request inside a denoiser replica, between its steps."""

import asyncio
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoscaling.rank_blocks import Block
from autoscaling.tasks import Paused, Step, Task
from autoscaling.urgency import Urgency
from deployments.checkpoints import Checkpoints, Unsaved
from deployments.config import DenoiserConfig
from deployments.messages import Denoised, DenoiseWork
from deployments.rank_group import Part
from deployments.ways import Way
from models.tensors import ParkedState
from parallel.plan import ParallelPlan

if TYPE_CHECKING:
    import ray


logger = logging.getLogger("ray.serve")


class RequestQuarantined(Exception):
    """The group broke during a request's steps as often as any request may break it."""

    def __init__(self, job_id: str, kills: int) -> None:
        super().__init__(job_id, kills)
        self.job_id, self.kills = job_id, kills

    def __str__(self) -> str:
        return f"job {self.job_id} broke the denoiser {self.kills} times"


class HandedOver(Exception):
    """The replica goes away: the job goes on from its checkpoint on another one."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} is handed over to another denoiser"


@dataclass(eq=False, slots=True)
class Held:
    """A request that is here, running or parked. A job may be here twice while its lease moves.

    state is what state_ref refers to. Having read it keeps a copy on this node: a rank's node that
    dies takes no state with it. plan, step_s: its last step's, where that tells how
    long others take. way, of_one_text: of steps with all texts, and with the positive
    one alone. paused: where the next step has, of which num_sections were made in sections_s
    by the group's generation paused_in.
    """

    id: str
    work: DenoiseWork
    conditioning: "ray.ObjectRef[Any]"
    way: Way
    of_one_text: Way
    urgency: Urgency
    arrived_s: float
    state: ParkedState
    state_ref: "ray.ObjectRef[Any]"
    first_step: int
    batch: Hashable | None = None
    block: Block | None = None
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    step_s: float | None = None
    paused: Paused | None = None
    paused_in: int = 0
    num_sections: int = 0
    sections_s: float = 0.0
    kills: int = 0
    ran_s: float = 0.0
    unsaved: Unsaved = field(default_factory=Unsaved)
    saved: bool = False
    failed: bool = False
    saving: "asyncio.Task[None] | None" = None
    moments: "asyncio.Queue[Denoised | Exception]" = field(default_factory=asyncio.Queue)

    @property
    def steps_left(self) -> int:
        """Until the latents are done."""
        return self.state.num_steps - self.state.step

    @property
    def is_open(self) -> bool:
        """There are steps to make, and nothing has failed."""
        return self.steps_left > 0 and not self.failed

    @property
    def next_way(self) -> Way:
        """The next step's."""
        skips = self.work.request.skips_guidance(self.state.step)
        return self.of_one_text if skips else self.way

    @property
    def part(self) -> Part:
        """What its next step begins from."""
        return Part(self.work.request, self.conditioning, self.state_ref)

    def describe(self, step_s: Mapping[int, float], under_way: Step | None) -> Task:
        """As it will be when what is under way of it has ended; step_s: of its next step, by
        degree.
        """
        made = 0.0 if self.paused is None else self.num_sections / self.paused.sections
        task = Task(
            id=self.id,
            arrived_s=self.arrived_s,
            deadline_s=self.urgency.deadline_s,
            # Only waiting makes a request older.
            express_from_s=self.urgency.express_from_s + self.ran_s,
            steps_left=self.steps_left - made,
            step_s=step_s,
            value=self.urgency.value,
            block=self.block,
            batch=self.batch,
            model=self.work.request.model,
            paused=self.paused,
        )
        if under_way is not None:
            under_way.advance(task)
        return task

    def moment(self, latents: "ray.ObjectRef[Any] | None" = None) -> Denoised:
        """Where it stands."""
        step, num_steps = self.state.step, self.state.num_steps
        made = step - self.first_step
        skipped = self.state.skipped
        return Denoised(step, num_steps, made, skipped, latents, self.plan.degree, self.step_s)

    def stands_on(self, block: Block) -> bool:
        """A step of it has paused on one of these ranks."""
        return self.paused is not None and self.paused.block.overlaps(block)

    def pause(self, paused: Paused, generation: int, took_s: float) -> None:
        """One more section of the next step was made."""
        self.paused, self.paused_in = paused, generation
        self.num_sections += 1
        self.sections_s += took_s

    def make_again(self) -> None:
        """Nothing of the next step is there any more, or all of it is made."""
        self.paused, self.num_sections, self.sections_s = None, 0, 0.0

    def save_is_due(self, config: DenoiserConfig, step_s: float) -> bool:
        """At the end, too, of whatever was long enough to be saved once."""
        if self.saving is not None and not self.saving.done():
            return False
        return self.unsaved.is_due(config, step_s) if self.steps_left else self.saved

    async def save(self, checkpoints: Checkpoints, state: ParkedState, plan: ParallelPlan) -> None:
        """Write a state while the next steps are made. Without it a kill costs more, but no job."""
        unsaved, self.unsaved = self.unsaved, Unsaved()
        work = self.work
        try:
            await asyncio.to_thread(checkpoints.save, work.job_id, work.request, state, plan)
        except OSError:
            logger.exception("job %s: step %d is not saved", work.job_id, state.step)
            self.unsaved.add(unsaved.seconds, unsaved.steps)
        else:
            self.saved = True

    def fail(self, error: Exception) -> None:
        """Tell whoever waits for the request, and make no further step of it."""
        self.failed = True
        self.moments.put_nowait(error)
