"""Runs the requests of one denoiser replica, step by step, on its group of ranks.

At a step boundary a request is nothing but its parked state. To preempt it, to change its degree
or to go on after a fault is all the same: the next step begins from that state, on other ranks or
later.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

import ray

from autoscaling.rank_blocks import Block
from autoscaling.step_scheduler import next_steps
from autoscaling.tasks import Paused, Step
from autoscaling.urgency import judge
from deployments.checkpoints import Checkpoints
from deployments.config import DenoiserConfig
from deployments.held import HandedOver, Held, RequestQuarantined
from deployments.messages import Denoised, DenoiseWork
from deployments.rank_group import GroupBroken, Made, RankGroup
from deployments.step_clock import StepClock
from deployments.traffic_counters import TrafficCounters
from deployments.ways import Way, ways_of
from jobs.store import LeaseLost
from models.catalog import Model
from models.conditioning import Conditioning
from models.memory import OutOfMemory
from models.request import VideoRequest

logger = logging.getLogger("ray.serve")

# Ray 2.60 forgets an object that a stream has told of, and that nobody else refers to, if the
# stream has ended before its consumer comes to read it.
KEPT_LATENTS = 8

T = TypeVar("T")


class StepLoop:
    """Holds the requests, asks the step scheduler at every boundary, and mends the group."""

    def __init__(
        self,
        group: RankGroup,
        checkpoints: Checkpoints,
        config: DenoiserConfig,
        degrees_for: Callable[[VideoRequest], Collection[int] | None],
    ) -> None:
        """degrees_for: at how many ranks a request fits into memory, None: at any number."""
        self.group = group
        self.checkpoints = checkpoints
        self.config = config
        self.degrees_for = degrees_for
        self.clock = StepClock(group, config.hang)
        self.traffic = TrafficCounters()
        self.num_taken = self.num_made = self.num_overtakings = 0
        self.finished: deque[ray.ObjectRef[Any]] = deque(maxlen=KEPT_LATENTS)
        self.held: dict[str, Held] = {}
        self.under_way: dict[str, Step] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.ready = asyncio.Event()
        self.boundary = asyncio.Event()
        self.acting = asyncio.Lock()
        self.num_between = 0
        self.is_leaving = False
        self.failure: BaseException | None = None

    async def start(self) -> None:
        """Form the group; GroupBroken if it can't."""
        await self.group.form()
        self._begin_generation()

    def check_health(self) -> None:
        """Raise why the group does not form any more."""
        if self.failure is not None:
            raise self.failure

    async def denoise(
        self, work: DenoiseWork, conditioning: Conditioning
    ) -> AsyncIterator[Denoised]:
        """Yield after each step; whoever leaves earlier stops the request at its next boundary.

        LeaseLost as soon as a later lease of the job asks for the same; HandedOver as soon as the
        replica is to go.
        """
        held = await self._take_in(work, conditioning)
        if self.is_leaving:
            raise HandedOver(work.job_id)
        before = [other for other in self.held.values() if other.work.job_id == work.job_id]
        if any(other.work.lease > work.lease for other in before):
            raise LeaseLost(work.job_id)  # a call that was long on its way
        for other in before:  # its pipeline is gone, or does not know it yet
            other.fail(LeaseLost(work.job_id))
        self.held[held.id] = held
        try:
            if held.steps_left:
                self._dispatch()
            else:
                self._spawn(self._finish(held))
            while True:
                moment = await held.moments.get()
                if isinstance(moment, Exception):
                    raise moment
                yield moment
                if moment.step == moment.num_steps:
                    return
        finally:
            del self.held[held.id]
            self._abandon(held)
            self._dispatch()

    async def hand_over(self) -> None:
        """Save every request at its next step boundary, and have its caller take it elsewhere; take
        in none from now on.
        """
        self.is_leaving = True
        self._dispatch()
        await asyncio.gather(*(self._hand_over(held) for held in list(self.held.values())))

    async def _hand_over(self, held: Held) -> None:
        while held.id in self.under_way or self._goes_on(held):
            self.boundary.clear()
            await self.boundary.wait()
        if held.failed:
            return
        if held.saving is not None:
            await held.saving
        if held.unsaved.steps:
            await held.save(self.checkpoints, held.state, held.plan)
        if held.steps_left:  # else its end is being told
            held.fail(HandedOver(held.work.job_id))

    def _goes_on(self, held: Held) -> bool:
        """Its paused step will be made to its end, and soon."""
        is_stuck = held.failed or self.failure is not None or self.num_between > 0
        return held.paused is not None and not is_stuck

    async def _take_in(self, work: DenoiseWork, conditioning: Conditioning) -> Held:
        """Read the checkpoint, if there is one, and judge how urgent the request is."""
        kept = ray.put(conditioning)
        await self.ready.wait()
        begun = await self._answered(self.group.begin(work.request, conditioning.num_texts, kept))
        state = begun.state
        first_step = state.step
        saved = await self.checkpoints.find(work.job_id, work.request)
        if saved is not None:
            state = saved.state
            logger.warning("job %s goes on from step %d", work.job_id, state.step)
        way, of_one_text = ways_of(
            work.request,
            begun,
            self.group.size,
            self.clock.topology,
            self.config.degrees,
            self.degrees_for(work.request),
        )
        arrived_s = time.monotonic()
        self.num_taken += 1
        return Held(
            id=f"{work.job_id}/{self.num_taken}",
            work=work,
            conditioning=kept,
            way=way,
            of_one_text=of_one_text,
            urgency=judge(
                self.config.urgency,
                priority=work.priority,
                admitted_s=arrived_s - work.queued_s,
                num_steps=state.num_steps - first_step,
                step_s=self.clock.expect(work.request.model, way),
            ),
            arrived_s=arrived_s,
            state=state,
            state_ref=ray.put(state),
            first_step=first_step,
            batch=None if begun.batch is None else (work.request.model, begun.batch),
        )

    async def load(self, model: Model) -> None:
        """Have the ranks read a model's weights at a step boundary."""
        async with self._between_steps():
            await self._answered(self.group.load(model))

    async def unload(self, model_id: str) -> None:
        """Have them forget a model at a step boundary."""
        async with self._between_steps():
            await self._answered(self.group.unload(model_id))

    @contextlib.asynccontextmanager
    async def _between_steps(self) -> AsyncIterator[None]:
        """Let the steps end that are under way, and begin none meanwhile: a step that waited for
        something else of its ranks would seem to hang.
        """
        self.num_between += 1
        self.boundary.set()
        try:
            async with self.acting:
                await self.ready.wait()
                while self.under_way:
                    self.boundary.clear()
                    await self.boundary.wait()
                yield
        finally:
            self.num_between -= 1
            self._dispatch()

    async def _answered(self, answer: Awaitable[T]) -> T:
        """What the group answers now; if it does not, it is broken."""
        generation = self.group.generation
        try:
            return await answer
        except GroupBroken as error:
            self._break(generation, error, [])
            raise

    def _dispatch(self) -> None:
        """Begin the steps that the step scheduler wants on the ranks that are idle."""
        if not self.ready.is_set() or self.failure is not None:
            return
        if self.num_between:
            return
        by_id = {held.id: held for held in self.held.values() if held.is_open}
        for held in self.held.values():
            if held.id not in by_id:
                self._abandon(held)
        if self.is_leaving:  # only what has paused goes on, to its next boundary
            by_id = {name: held for name, held in by_id.items() if held.paused is not None}
        tasks = (
            held.describe(
                self.clock.expect(held.work.request.model, held.next_way),
                self.under_way.get(held.id),
            )
            for held in by_id.values()
        )
        under_way = list({step.task_id: step for step in self.under_way.values()}.values())
        for step in next_steps(
            time.monotonic(), self.group.size, tasks, under_way, self.config.scheduler
        ):
            together = [by_id[task_id] for task_id in (step.task_id, *step.batched)]
            others = (held for held in by_id.values() if held not in together)
            self.num_overtakings += any(held.stands_on(step.block) for held in others)
            self.under_way |= {held.id: step for held in together}
            self._spawn(self._make(together, step, self.group.generation))

    def _abandon(self, held: Held) -> None:
        """What was made of its next step is not wanted: others may run there."""
        if held.paused is None or held.id in self.under_way:
            return
        if self.ready.is_set() and held.paused_in == self.group.generation:
            self.group.abandon(held.paused.block)
        held.make_again()
        self.boundary.set()

    async def _make(self, together: list[Held], step: Step, generation: int) -> None:
        """One step of one request or of several, or a section of one; and what follows from it."""
        first = together[0]
        way = first.next_way
        began_s = time.monotonic()
        try:
            if generation != self.group.generation or not self.ready.is_set():
                return  # it broke before this began
            made = await self._made(together, step, way)
        except GroupBroken as error:
            cause = getattr(error.__cause__, "cause", None)
            if isinstance(cause, OutOfMemory):  # of one rank, for which the others wait
                self._lack(together, step.block, cause)
            self._break(generation, error, together)
        except OutOfMemory as error:
            self._lack(together, step.block, error)
        else:
            took_s = time.monotonic() - began_s
            self.traffic.add(made.traffic)
            if made.states:
                self._note(together, way, step.block, made, first.sections_s + took_s)
            elif generation == self.group.generation and self.ready.is_set():
                first.pause(Paused(step.block, step.sections), generation, took_s)
        finally:
            for held in together:
                del self.under_way[held.id]
                if held.id not in self.held:
                    self._abandon(held)
            self.boundary.set()
            self._dispatch()

    async def _made(self, together: list[Held], step: Step, way: Way) -> Made:
        first = together[0]
        limit_s = self.clock.limit_s(first.work.request.model, way, step.block) * len(together)
        if first.paused is not None:
            return await self.group.go_on(step.block, limit_s)
        parts, plan = [held.part for held in together], way.plans[step.block.size]
        return await self.group.step(parts, plan, step.block, limit_s, step.sections)

    def _lack(self, together: list[Held], block: Block, error: OutOfMemory) -> None:
        """They fail, unless what lies there of a paused step may be what took the memory."""
        others = [held for held in self.held.values() if held not in together]
        standing = [held for held in others if held.stands_on(block)]
        for held in standing:
            self._abandon(held)
        if not standing:
            for held in together:
                held.fail(error)

    def _note(
        self, together: list[Held], way: Way, block: Block, made: Made, took_s: float
    ) -> None:
        """Remember the time, if it is one request's who made do with nothing earlier, and the
        states; tell whoever waits.
        """
        self.num_made += 1
        request = together[0].work.request
        skipped = made.states[0].skipped - together[0].state.skipped
        is_whole = way is together[0].way and not skipped
        alone_s = took_s if len(together) == 1 else None
        if skipped < request.passes_per_step:  # the model was asked
            self.clock.note(request.model, way, block, alone_s)
        for held, state, reference in zip(together, made.states, made.references, strict=True):
            held.make_again()
            held.state, held.state_ref, held.block = state, reference, block
            held.plan, held.step_s = way.plans[block.size], alone_s if is_whole else None
            held.ran_s += took_s
            held.unsaved.add(took_s)
            if held.save_is_due(self.config, took_s):
                held.saving = self._spawn(held.save(self.checkpoints, state, held.plan))
            if held.steps_left:
                held.moments.put_nowait(held.moment())
            else:
                self._spawn(self._finish(held))

    async def _finish(self, held: Held) -> None:
        """Hand over the latents; a checkpoint that is being written is there by then."""
        if held.saving is not None:
            await held.saving
        latents = ray.put(held.state.latents)
        self.finished.append(latents)
        held.moments.put_nowait(held.moment(latents))

    def _begin_generation(self) -> None:
        self.clock.begin_generation()
        self.ready.set()
        self._spawn(self._watch(self.group.generation))
        self._dispatch()

    async def _watch(self, generation: int) -> None:
        """Hear of a rank's death at once, also while it has nothing to do."""
        dead = await self.group.death()
        guilty = [
            held
            for held in self.held.values()
            if held.id in self.under_way
            and not dead.isdisjoint(self.under_way[held.id].block.ranks)
        ]
        self._break(generation, GroupBroken(f"ranks {sorted(dead)} died"), guilty)

    def _break(self, generation: int, error: GroupBroken, guilty: list[Held]) -> None:
        """End the generation, once; those during whose steps it broke too often are through."""
        if generation != self.group.generation or not self.ready.is_set():
            return
        logger.warning("generation %d: %s", generation, error)
        self.ready.clear()
        for held in self.held.values():
            held.make_again()
        self.boundary.set()
        for held in guilty:
            held.kills += 1
            if held.kills >= self.config.max_kills and not held.failed:
                held.fail(RequestQuarantined(held.work.job_id, held.kills))
        self._spawn(self._form_again())

    async def _form_again(self) -> None:
        try:
            await self.group.form()
        except GroupBroken as error:
            # Serve replaces the replica. Its requests wait until then, and go on in the next one:
            # failing now, they would have used up their attempts before there is one.
            self.failure = error
        else:
            self._begin_generation()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A fault in here is one of the replica: it can't be trusted any more."""
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("the step loop has failed", exc_info=error)
            self.failure = self.failure or error
