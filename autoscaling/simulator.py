"""A cluster's denoising, event by event, by the rules that the live cluster runs.

Which steps run where is the step scheduler's to say, when a request is due `judge`'s, which degrees
there are `quickest_plans`', who leaves the queue `next_in_line`'s. What is simulated is time alone.
Deterministic: the same requests, the same configuration and the same seed end alike.
"""

import heapq
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoscaling.simulated_cluster import (
    ClusterConfig,
    Fleet,
    History,
    Job,
    Node,
    NodePolicy,
    StepPolicy,
)
from autoscaling.step_scheduler import StepSchedulerConfig, next_steps
from autoscaling.tasks import Step, Task
from autoscaling.urgency import judge
from autoscaling.workloads import WEIGHTS_GB, Asked, VideoKind
from jobs.order import Waiting, next_in_line, next_turn
from parallel.plan import P4D, quickest_plans

USABLE = 0.95


@dataclass(frozen=True, slots=True)
class GuaranteedSet:
    """The live step scheduler."""

    config: StepSchedulerConfig = field(default_factory=StepSchedulerConfig)

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """The live function's."""
        return next_steps(now_s, num_ranks, tasks, under_way, self.config)


def step_seconds(kind: VideoKind, gpus: int, card_gb: float | None = None) -> dict[int, float]:
    """By degree, for every degree at which so many A100s can share a step and one was measured, and
    at which it fits beside the weights of all families, where a card's memory is told.

    ValueError if there is none.
    """
    degrees = [
        degree
        for degree in kind.measured_s
        if degree <= gpus
        and (card_gb is None or WEIGHTS_GB + kind.memory_gb(degree) <= card_gb * USABLE)
    ]
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
        scaling: NodePolicy | None = None,
    ) -> None:
        self.config = config
        self.make_policy = make_policy
        self.scaling = scaling
        self.open: dict[str, Job] = {}
        self.queue: dict[int, Job] = {}
        self.has_more = True
        self.rng = random.Random(seed)
        self.time_decisions = time_decisions
        self.nodes = [Node(config.gpus_per_node, make_policy()) for _ in range(config.num_nodes)]
        self.taking = list(self.nodes)
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
        for hang in config.hangs:
            self._at(hang.at_s, self._hang, self.nodes[hang.node])
        if scaling is not None:
            self._at(0.0, self._scale, scaling)

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
        self.history.end_s = max((job.finished_s or 0.0 for job in self.history.jobs), default=0.0)
        for node in self.nodes:
            self.history.node_s += max(0.0, self.history.end_s - node.asked_s)
        return self.history

    def _scale(self, scaling: NodePolicy) -> None:
        """Ask for nodes, or let some go: those first that are not there yet, then the emptiest."""
        staying = [node for node in self.nodes if not node.is_leaving]
        coming = [node for node in staying if not node.is_ready]
        ready = len(staying) - len(coming)
        gpus = max(1, ready * self.config.gpus_per_node)
        idle = sum(node.idle_gpus() for node in staying if node.is_ready)
        wanted = scaling.nodes(
            Fleet(
                self.now_s,
                ready,
                tuple(node.asked_s + self.config.start.total_s - self.now_s for node in coming),
                self.history.jobs,
                self.open.values(),
                self.queue.values(),
                1 - idle / gpus,
            )
        )
        for _ in range(wanted - len(staying)):
            self._ask_for_node()
        surplus = sorted(staying, key=lambda node: (node.is_ready, len(node.jobs), -node.asked_s))
        for node in surplus[: max(0, len(staying) - wanted)]:
            self._leave(node)
            self._let_go(node)
        if self.open or self.has_more:
            self._at(self.now_s + self.config.scale_every_s, self._scale, scaling)

    def _ask_for_node(self) -> None:
        node = Node(self.config.gpus_per_node, self.make_policy(), is_ready=False)
        node.asked_s = node.seen_s = self.now_s
        self.nodes.append(node)
        self._at(self.now_s + self.config.start.total_s, self._become_ready, node)

    def _become_ready(self, node: Node) -> None:
        if not node.is_leaving:
            node.is_ready, node.seen_s = True, self.now_s
            self.taking.append(node)
            self._take_from_queue()

    def _let_go(self, node: Node) -> None:
        """A node that leaves ends with its last step."""
        if node.is_leaving and node in self.nodes and not node.jobs:
            self.nodes.remove(node)
            self.history.node_s += self.now_s - node.asked_s

    def _at(self, moment_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (moment_s, self.num_events, act, arguments))

    def _next_arrival(self, coming: Iterator[Asked]) -> None:
        asked = next(coming, None)
        self.has_more = asked is not None
        if asked is not None:
            self._at(asked.arrived_s, self._arrive, asked, coming)

    def _arrive(self, asked: Asked, coming: Iterator[Asked]) -> None:
        self._next_arrival(coming)
        kind = asked.kind
        if kind.name not in self.step_s:
            self.step_s[kind.name] = step_seconds(
                kind, self.config.gpus_per_node, self.config.card_gb
            )
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
            model=kind.family,
        )
        error = self.config.cost_error
        slowness = math.exp(self.rng.gauss(0.0, error)) if error else 1.0
        job = Job(asked, task, slowness, kind.num_steps)
        self.history.jobs.append(job)
        self.open[job.task.id] = job
        self._hand_over(job)

    def _hand_over(self, job: Job) -> None:
        """To a node, or into the queue if none has a slot."""
        if self.config.slots is None:
            if self.taking:
                self._take(job, self.taking)
            return
        if not job.turn:
            others = [other.turn for other in self.open.values() if other.turn]
            account = job.asked.account
            own = [
                other.turn
                for other in self.open.values()
                if other.turn and other.asked.account == account
            ]
            job.turn = next_turn(own, others)
        self.queue[int(job.task.id)] = job
        self._take_from_queue()

    def _take_from_queue(self) -> None:
        """As pipelines lease jobs, in the queue's order."""
        slots = self.config.slots
        while self.queue and slots is not None:
            taking = [node for node in self.taking if len(node.jobs) < slots]
            if not taking:
                return
            number = next(iter(self.queue)) if len(self.queue) == 1 else self._next_in_line()
            self._take(self.queue.pop(number), taking)

    def _next_in_line(self) -> int:
        """The live queue's order."""
        waiting = [
            Waiting(
                number,
                self.config.plans.limits[job.asked.plan].priority,
                job.turn,
                int(1000 * (self.now_s - job.asked.arrived_s)),
            )
            for number, job in self.queue.items()
        ]
        return next_in_line(waiting, int(1000 * self.config.ageing_s))[0]

    def _take(self, job: Job, taking: list[Node]) -> None:
        """The one of two nodes with less work, where Serve's router compares requests."""
        if len(taking) > 2:
            taking = self.rng.sample(taking, 2)
        node = min(taking, key=lambda node: node.load_s)
        node.jobs[job.task.id] = job
        node.load_s += job.task.steps_left * job.asked.kind.measured_s[1]
        self.touched[node] = None

    def _dispatch(self, node: Node) -> None:
        """Begin the steps that the node's policy wants."""
        if node.is_forming:
            return
        tasks = [job.task for job in node.jobs.values()]
        if node.is_leaving:  # only what has paused goes on, to its next boundary
            tasks = [task for task in tasks if task.paused]
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
        takes_s = task.step_s[step.block.size] / step.sections * job.slowness
        takes_s += self.config.switch_s if moved else 0.0
        job.num_moves += moved
        step.advance(task)
        node.under_way[task.id] = step
        self._at(self.now_s + takes_s, self._end, node, job, step, takes_s)

    def _end(self, node: Node, job: Job, step: Step, takes_s: float) -> None:
        if node.under_way.get(job.task.id) is not step or step is node.hung:
            return  # its node died, or its ranks
        del node.under_way[job.task.id]
        gpu_s = takes_s * step.block.size
        self.history.busy_s += gpu_s
        job.gpu_s += gpu_s
        job.ran_s += takes_s
        node.load_s -= job.asked.kind.measured_s[1] / step.sections
        self.touched[node] = None
        if job.task.paused:
            return
        steps_left = int(job.task.steps_left)
        if job.ran_s - job.saved_ran_s >= self.config.checkpoint_s:
            job.saved_left, job.saved_ran_s = steps_left, job.ran_s
        if steps_left == 0:
            job.finished_s = self.now_s
            del node.jobs[job.task.id], self.open[job.task.id]
            self._take_from_queue()
        elif node.is_leaving:
            self._move(node, job, steps_left)
        self._let_go(node)

    def _hang(self, node: Node) -> None:
        """The oldest step under way will not end; after a while that is seen."""
        step = next(iter(node.under_way.values()), None)
        if step is None or node.hung is not None:
            return
        node.hung = step
        step_s = node.jobs[step.task_id].task.step_s[step.block.size]
        limit_s = max(self.config.hang_least_s, self.config.hang_factor * step_s)
        self._at(self.now_s + limit_s, self._break, node)

    def _break(self, node: Node) -> None:
        """All ranks end and form again: what is under way, or has paused, is made again."""
        node.hung, node.is_forming = None, True
        for job in node.jobs.values():
            task = job.task
            if task.id in node.under_way or task.paused:
                job.lost_steps += 1
                task.steps_left = math.floor(task.steps_left) + 1
            task.block = task.paused = None
        node.under_way.clear()
        node.load_s = sum(
            job.task.steps_left * job.asked.kind.measured_s[1] for job in node.jobs.values()
        )
        self.touched[node] = None
        if node.is_leaving:
            for job in list(node.jobs.values()):
                self._move(node, job, int(job.task.steps_left))
        self._let_go(node)
        self._at(self.now_s + self.config.form_s, self._form, node)

    def _form(self, node: Node) -> None:
        node.is_forming = False
        self.touched[node] = None

    def _close(self, node: Node) -> None:
        """It takes no request from now on."""
        node.is_leaving = True
        if node in self.taking:
            self.taking.remove(node)

    def _leave(self, node: Node) -> None:
        """The node was told: who is at a boundary goes at once, the others at their next one, and
        their last state is saved until then.
        """
        self._close(node)
        for job in list(node.jobs.values()):
            if job.task.id in node.under_way or job.task.paused:
                job.saved_left = math.floor(job.task.steps_left) + 1
            else:
                self._move(node, job, int(job.task.steps_left))

    def _die(self, node: Node) -> None:
        """Whoever is still there goes on from what was saved of it."""
        self._close(node)
        node.under_way.clear()
        for job in list(node.jobs.values()):
            job.lost_steps += job.saved_left - math.floor(job.task.steps_left)
            self._move(node, job, job.saved_left)
        self._let_go(node)

    def _move(self, node: Node, job: Job, steps_left: int) -> None:
        job.task.steps_left, job.task.block, job.task.paused = steps_left, None, None
        job.saved_left, job.saved_ran_s = steps_left, job.ran_s
        del node.jobs[job.task.id]
        self._hand_over(job)
