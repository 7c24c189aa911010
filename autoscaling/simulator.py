"""A cluster's denoising, event by event, by the rules that the live cluster runs.

Which steps run where is the step scheduler's to say, when a request is due `judge`'s, which degrees
there are `quickest_plans`'. What is simulated is time alone. Deterministic: the same requests, the
same configuration and the same seed end alike.
"""

import heapq
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from autoscaling.step_scheduler import Step, StepSchedulerConfig, Task, next_steps
from autoscaling.urgency import UrgencyConfig, judge
from autoscaling.workloads import Asked, VideoKind
from credits.plans import PlanTable
from parallel.plan import P4D, quickest_plans


class StepPolicy(Protocol):
    """Says which steps begin on the ranks of one node."""

    def next_steps(
        self,
        now_s: float,
        num_ranks: int,
        tasks: Collection[Task],
        under_way: Sequence[Step],
    ) -> list[Step]:
        """As `step_scheduler.next_steps`; called at every event of the node."""


@dataclass(frozen=True, slots=True)
class GuaranteedSet:
    """The live step scheduler."""

    config: StepSchedulerConfig = field(default_factory=StepSchedulerConfig)

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """The live function's."""
        return next_steps(now_s, num_ranks, tasks, under_way, self.config)


@dataclass(frozen=True, slots=True)
class Reclaim:
    """A node that goes away: told notice_s before; 0: it dies unforeseen."""

    node: int
    gone_s: float
    notice_s: float = 120.0


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """num_nodes of gpus_per_node A100s each.

    switch_s: what it costs to go on with a request on other ranks than before; cost_error: how far
    the true step times are from those that are expected, as the standard deviation of their
    logarithm, drawn for every request; checkpoint_s: a request is saved when it has run for so long
    since it was saved last, and what it made since is lost if its node dies without notice.
    """

    num_nodes: int = 1
    gpus_per_node: int = 8
    switch_s: float = 0.1
    cost_error: float = 0.0
    checkpoint_s: float = 30.0
    reclaims: tuple[Reclaim, ...] = ()
    urgency: UrgencyConfig = field(default_factory=UrgencyConfig)
    plans: PlanTable = field(default_factory=PlanTable)


@dataclass(eq=False, slots=True)
class Job:
    """A request in the simulated cluster.

    task.steps_left is what it will be when the step under way has ended. slowness: by which its
    steps take longer than expected. saved_left: steps left at the last checkpoint, made when it had
    run for saved_ran_s. gpu_s: what its steps took; lost_steps: made again.
    """

    asked: Asked
    task: Task
    slowness: float
    saved_left: int
    finished_s: float | None = None
    ran_s: float = 0.0
    saved_ran_s: float = 0.0
    gpu_s: float = 0.0
    lost_steps: int = 0
    num_moves: int = 0

    @property
    def in_time(self) -> bool:
        """It ended by its deadline."""
        return self.finished_s is not None and self.finished_s <= self.task.deadline_s + 1e-6

    @property
    def latency_s(self) -> float:
        """From its arrival to its end. ValueError if it has none."""
        if self.finished_s is None:
            raise ValueError(f"request {self.task.id} has not ended")
        return self.finished_s - self.asked.arrived_s


@dataclass(eq=False, slots=True)
class Node:
    """GPUs that share steps, and the requests that were handed to them.

    load_s: GPU-seconds of all of them, on one GPU each; wasted_gpus: since seen_s.
    """

    num_gpus: int
    policy: StepPolicy
    jobs: dict[str, Job] = field(default_factory=dict)
    under_way: dict[str, Step] = field(default_factory=dict)
    load_s: float = 0.0
    is_leaving: bool = False
    seen_s: float = 0.0
    wasted_gpus: int = 0

    def idle_gpus(self) -> int:
        """Those without a step."""
        return self.num_gpus - sum(step.block.size for step in self.under_way.values())


@dataclass(slots=True)
class History:
    """What happened. busy_s: GPU-seconds of steps; waste_s: of idle GPUs while somebody waited."""

    jobs: list[Job] = field(default_factory=list)
    end_s: float = 0.0
    busy_s: float = 0.0
    waste_s: float = 0.0
    decisions: list[tuple[int, float]] = field(default_factory=list)
    """Of every question to a policy while a GPU was idle: the requests at the node, and seconds."""


def step_seconds(kind: VideoKind, gpus: int) -> dict[int, float]:
    """By degree, for every degree at which so many A100s can share a step and one was measured."""
    degrees = [degree for degree in kind.measured_s if degree <= gpus]
    plans = quickest_plans(kind.shape, gpus, P4D, degrees)
    return {degree: kind.measured_s[degree] for degree in sorted(plans)}


class Simulator:
    """Runs requests through a cluster until the last has ended."""

    def __init__(
        self,
        config: ClusterConfig,
        make_policy: Callable[[], StepPolicy],
        *,
        seed: int = 0,
        time_decisions: bool = False,
    ) -> None:
        self.config = config
        self.rng = random.Random(seed)
        self.time_decisions = time_decisions
        self.nodes = [Node(config.gpus_per_node, make_policy()) for _ in range(config.num_nodes)]
        self.history = History()
        self.now_s = 0.0
        self.step_s: dict[str, Mapping[int, float]] = {}
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.num_events = 0
        self.touched: dict[Node, None] = {}
        for reclaim in config.reclaims:
            node = self.nodes[reclaim.node]
            if reclaim.notice_s:
                self._at(reclaim.gone_s - reclaim.notice_s, self._leave, node)
            self._at(reclaim.gone_s, self._die, node)

    def run(self, requests: Iterable[Asked]) -> History:
        """What became of every request; those that no node is left for have not ended."""
        coming = iter(requests)
        self._next_arrival(coming)
        while self.events:
            self.now_s = self.events[0][0]
            while self.events and self.events[0][0] <= self.now_s:
                _, _, act, arguments = heapq.heappop(self.events)
                act(*arguments)
            for node in self.touched:
                self.history.waste_s += (self.now_s - node.seen_s) * node.wasted_gpus
                self._dispatch(node)
                node.seen_s = self.now_s
                waits = len(node.jobs) > len(node.under_way)
                node.wasted_gpus = node.idle_gpus() if waits else 0
            self.touched.clear()
        self.history.end_s = self.now_s
        return self.history

    def _at(self, moment_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (moment_s, self.num_events, act, arguments))

    def _next_arrival(self, coming: Iterator[Asked]) -> None:
        asked = next(coming, None)
        if asked is not None:
            self._at(asked.arrived_s, self._arrive, asked, coming)

    def _arrive(self, asked: Asked, coming: Iterator[Asked]) -> None:
        self._next_arrival(coming)
        kind = asked.kind
        if kind.name not in self.step_s:
            self.step_s[kind.name] = step_seconds(kind, self.config.gpus_per_node)
        step_s = self.step_s[kind.name]
        urgency = judge(
            self.config.urgency,
            priority=self.config.plans.limits[asked.plan].priority,
            admitted_s=asked.arrived_s,
            num_steps=kind.num_steps,
            step_s=step_s,
        )
        task = Task(
            id=str(len(self.history.jobs)),
            arrived_s=asked.arrived_s,
            deadline_s=urgency.deadline_s,
            express_from_s=urgency.express_from_s,
            steps_left=kind.num_steps,
            step_s=step_s,
            value=urgency.value,
        )
        error = self.config.cost_error
        slowness = math.exp(self.rng.gauss(0.0, error)) if error else 1.0
        job = Job(asked, task, slowness, kind.num_steps)
        self.history.jobs.append(job)
        self._hand_over(job)

    def _hand_over(self, job: Job) -> None:
        """To the one of two nodes with less work, where Serve's router compares requests."""
        staying = [node for node in self.nodes if not node.is_leaving]
        if not staying:
            return
        if len(staying) > 2:
            staying = self.rng.sample(staying, 2)
        node = min(staying, key=lambda node: node.load_s)
        node.jobs[job.task.id] = job
        node.load_s += job.task.steps_left * job.asked.kind.measured_s[1]
        self.touched[node] = None

    def _dispatch(self, node: Node) -> None:
        """Begin the steps that the node's policy wants."""
        if node.is_leaving:
            return
        tasks = [job.task for job in node.jobs.values()]
        under_way = list(node.under_way.values())
        idle = node.idle_gpus()
        began = time.perf_counter() if self.time_decisions else 0.0
        steps = node.policy.next_steps(self.now_s, node.num_gpus, tasks, under_way)
        if self.time_decisions and idle:
            self.history.decisions.append((len(tasks), time.perf_counter() - began))
        for step in steps:
            self._begin(node, step)

    def _begin(self, node: Node, step: Step) -> None:
        job = node.jobs[step.task_id]
        task = job.task
        moved = task.block is not None and task.block != step.block
        takes_s = task.step_s[step.block.size] * job.slowness
        takes_s += self.config.switch_s if moved else 0.0
        job.num_moves += moved
        task.steps_left -= 1
        task.block = step.block
        node.under_way[task.id] = step
        self._at(self.now_s + takes_s, self._end, node, job, step, takes_s)

    def _end(self, node: Node, job: Job, step: Step, takes_s: float) -> None:
        if node.under_way.get(job.task.id) is not step:
            return  # its node died
        del node.under_way[job.task.id]
        gpu_s = takes_s * step.block.size
        self.history.busy_s += gpu_s
        job.gpu_s += gpu_s
        job.ran_s += takes_s
        node.load_s -= job.asked.kind.measured_s[1]
        self.touched[node] = None
        if job.ran_s - job.saved_ran_s >= self.config.checkpoint_s:
            job.saved_left, job.saved_ran_s = job.task.steps_left, job.ran_s
        if job.task.steps_left == 0:
            job.finished_s = self.now_s
            del node.jobs[job.task.id]
        elif node.is_leaving:
            self._move(node, job, job.task.steps_left)

    def _leave(self, node: Node) -> None:
        """The node was told: who is at a boundary goes at once, the others at their next one, and
        their last state is saved until then.
        """
        node.is_leaving = True
        for job in list(node.jobs.values()):
            if job.task.id in node.under_way:
                job.saved_left = job.task.steps_left + 1
            else:
                self._move(node, job, job.task.steps_left)

    def _die(self, node: Node) -> None:
        """Whoever is still there goes on from what was saved of it."""
        node.is_leaving = True
        node.under_way.clear()
        for job in list(node.jobs.values()):
            job.lost_steps += job.saved_left - job.task.steps_left
            self._move(node, job, job.saved_left)

    def _move(self, node: Node, job: Job, steps_left: int) -> None:
        job.task.steps_left, job.task.block = steps_left, None
        job.saved_left, job.saved_ran_s = steps_left, job.ran_s
        del node.jobs[job.task.id]
        self._hand_over(job)
