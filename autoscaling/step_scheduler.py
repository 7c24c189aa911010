"""Decides at every step boundary which requests run, and on which ranks of a group.

Pure: the denoiser and the cluster simulator run the same. A guaranteed set by Moore and Hodgson's
rule (Management Science 15, 1968) on the fluid relaxation says who can still be in time; those run
first, on aligned blocks whose sizes are powers of two. A request that does not run is parked: it
keeps its state and loses nothing but time.
"""

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter, itemgetter

from pydantic import BaseModel, Field

from autoscaling.rank_blocks import Block, RankBoard, bits_of
from autoscaling.tasks import Step, Task

LATER = 1.5


class StepSchedulerConfig(BaseModel, frozen=True, extra="forbid"):
    """capacity: the share of the GPUs' time that may be promised. hurry: a request runs at the
    smallest degree that ends within this share of the time it has. max_step_s: a degree whose step
    is longer is taken only if there is no quicker one, for so long may everyone else wait. Who has
    no choice then may also run at the next smaller degree, which makes better use of the GPUs, if
    it misses no deadline by that, its steps are not longer than long_step_s, and everyone else who
    waits and is promised to be in time has more than patience_s to spare. hold_s: a block is held
    free for a request whose slack is not longer than this and a step.
    min_efficiency: idle ranks are given to a request while its steps keep them so busy. max_batch:
    so many requests may make a step in one on a single rank; a video's last bits then depend on
    whom it meets there. late_capacity: the share of the time that those who are late are promised,
    as far as the others leave it. section_s: a longer step pauses between blocks of its model about
    so often, so that another model's may be made first; infinite: never.
    """

    capacity: float = Field(0.95, gt=0, le=1)
    hurry: float = Field(0.35, gt=0, le=1)
    max_step_s: float = Field(2.5, gt=0)
    long_step_s: float = Field(6.0, ge=0)
    patience_s: float = Field(80.0, ge=0)
    hold_s: float = Field(5.0, ge=0)
    min_efficiency: float = Field(0.6, ge=0)
    max_batch: int = Field(1, ge=1)
    late_capacity: float = Field(0.85, ge=0, le=1)
    section_s: float = Field(2.5, gt=0)


def next_steps(
    now_s: float,
    num_ranks: int,
    tasks: Iterable[Task],
    under_way: Sequence[Step],
    config: StepSchedulerConfig,
) -> list[Step]:
    """The steps that begin now, on ranks where none is under way.

    tasks: everyone's, by their arrival, as they will be when the steps that are under way have
    ended; those get no further one now, but what is left of them is promised time. Of two with one
    deadline the first to come goes first, so that who is at work stays at work. ValueError if a
    task has no degree that num_ranks allows.
    """
    board = RankBoard(now_s, num_ranks, [(step.block, step.ends_s) for step in under_way])
    if not board.free:
        return []
    fit = [task if task.sizes[-1][0] <= num_ranks else _fitted(task, num_ranks) for task in tasks]
    everyone = sorted(fit, key=attrgetter("deadline_s"))
    busy = {task_id: step for step in under_way for task_id in (step.task_id, *step.batched)}
    in_time = guaranteed(now_s, num_ranks, everyone, config, busy)
    promised: Sequence[Promise] = in_time
    if config.late_capacity and len(in_time) < len(everyone):
        promised = _with_later(now_s, num_ranks, everyone, in_time, config, busy)
    express = [task for task in everyone if task.express_from_s <= now_s and task.id not in busy]
    first = {task.id for task in express}.union(busy)
    paused = [task for task in everyone if task.paused]
    plan = _Placing(board, config, in_time, paused, busy)
    for task in express:
        plan.place(task, must=True)
    for due_s, _, task in promised:
        if not board.free:
            break
        if task.id not in first:
            plan.place(task, must=plan.is_urgent(task, due_s))
    rest: list[Task] = []
    if board.free:
        first.update(task.id for _, _, task in promised)
        rest = [task for task in everyone if task.id not in first]
        rest.sort(key=lambda task: _effort(task, now_s))
        for task in rest:
            plan.place(task, must=False)
        plan.grow()
    if config.max_batch > 1:
        plan.batch([*express, *(task for _, _, task in promised if task.id not in busy), *rest])
    return plan.steps()


def _fitted(task: Task, num_ranks: int) -> Task:
    """The task with no degree but those that there are ranks for."""
    step_s = {degree: step_s for degree, step_s in task.step_s.items() if degree <= num_ranks}
    if not step_s:
        raise ValueError(f"task {task.id} runs at {sorted(task.step_s)} of {num_ranks} ranks")
    return replace(task, step_s=step_s)


Promise = tuple[float, float, Task]
"""When a task is to be done, the least GPU-seconds for it, and the task."""


def guaranteed(
    now_s: float,
    num_ranks: int,
    by_deadline: Iterable[Task],
    config: StepSchedulerConfig,
    busy: Mapping[str, Step] | None = None,
) -> list[Promise]:
    """The tasks that can all be in time, as far as GPU-seconds tell, by deadline.

    Where they can't all be, those worth least for their work are left out. busy: the steps under
    way, by task, from whose ends on theirs count.
    """
    busy = busy or {}
    kept: list[Promise] = []
    left_out: set[int] = set()
    least: list[tuple[float, int]] = []
    total, per_s = 0.0, config.capacity * num_ranks
    for task in by_deadline:
        # a step may take longer than it should
        start_s = max(now_s, busy[task.id].ends_s) if task.id in busy else now_s
        if task.steps_left * task.quickest_s > task.deadline_s - start_s:
            continue  # too late; not asked further, since it has a later deadline in mind
        work = task.least_work(start_s, task.deadline_s)
        if not work:  # its last step is under way
            continue
        heapq.heappush(least, (task.value / work, len(kept)))
        kept.append((task.deadline_s, work, task))
        total += work
        while least and total > per_s * (task.deadline_s - now_s):
            number = heapq.heappop(least)[1]
            left_out.add(number)
            total -= kept[number][1]
    return [promise for number, promise in enumerate(kept) if number not in left_out]


def _with_later(
    now_s: float,
    num_ranks: int,
    everyone: Sequence[Task],
    in_time: Sequence[Promise],
    config: StepSchedulerConfig,
    busy: Mapping[str, Step],
) -> list[Promise]:
    """Those in time, and a later deadline for others, as many as it can be promised to with what
    the ones in time leave over, up to late_capacity.
    """
    passed = {task.id for _, _, task in in_time}.union(busy)
    entries: list[tuple[float, float, Task, bool]] = [(*promise, False) for promise in in_time]
    for task in everyone:
        if task.id not in passed:
            due_s = task.later_s
            if due_s < now_s + task.steps_left * task.quickest_s:
                due_s = _later_deadline(task, now_s)
            work = task.least_work(now_s, due_s)
            if work is not None:  # but for what rounding takes, it never is
                entries.append((due_s, work, task, True))
    entries.sort(key=itemgetter(0))
    total, per_s = 0.0, config.late_capacity * num_ranks
    left_out: set[int] = set()
    least: list[tuple[float, int]] = []
    for number, (due_s, work, task, is_late) in enumerate(entries):
        total += work
        if is_late:
            heapq.heappush(least, (task.value / work, number))
        while least and total > per_s * (due_s - now_s):
            gone = heapq.heappop(least)[1]
            left_out.add(gone)
            total -= entries[gone][1]
    return [entry[:3] for number, entry in enumerate(entries) if number not in left_out]


def _later_deadline(task: Task, now_s: float) -> float:
    """The first that it can keep of deadlines that are LATER times as far from its arrival as the
    one before.
    """
    done_s = now_s + task.least_seconds
    # it may have come here after its deadline
    wait_s = max(task.deadline_s - task.arrived_s, task.least_seconds)
    while task.arrived_s + wait_s < done_s:
        wait_s *= LATER
    task.later_s = task.arrived_s + wait_s
    return task.later_s


def _effort(task: Task, now_s: float) -> float:
    """Of those with no promise: the least work for its value first, and less with every wait."""
    degree, step_s = task.sizes[0]
    lateness = max(0.0, now_s - task.deadline_s) / (20 * task.least_seconds)
    return task.steps_left * degree * step_s / task.value / (1 + lateness)


class _Placing:
    """Gives blocks of a board to tasks, one after the other."""

    def __init__(
        self,
        board: RankBoard,
        config: StepSchedulerConfig,
        in_time: Sequence[Promise],
        paused: Sequence[Task],
        busy: Collection[str],
    ) -> None:
        """in_time: who is promised to be. paused: who is, or will be when the section under way has
        ended.
        """
        self.board = board
        self.config = config
        self.paused = [(bits_of(task.paused.block), task) for task in paused if task.paused]
        self.waiting = [(bits, task) for bits, task in self.paused if task.id not in busy]
        self.in_time = in_time
        self.busy = busy
        self.placed: dict[str, tuple[Task, Block]] = {}
        self.batches: dict[str, list[Task]] = {}

    def is_urgent(self, task: Task, due_s: float) -> bool:
        """It can't wait for much longer than the longest step."""
        slack_s = due_s - self.board.now_s - task.least_seconds
        return slack_s <= self.config.max_step_s + self.config.hold_s

    def place(self, task: Task, *, must: bool) -> None:
        """Give the task a free block; if it must run and there is none, hold one for it."""
        if not self.board.free or task.id in self.placed:
            return
        if task.paused is not None:
            self._resume(task, task.paused.block, must=must)
            return
        degrees = self._degrees(task)
        degree = self._degree(task, degrees)
        block = self._fit(task, degree)
        if block is None and self.waiting:
            self._make_way(task, degree, must)
        if block is None and must:
            block = self._hold(task, degree)
        elif block is None:
            smaller = (size for size in reversed(degrees) if size < degree)
            found = (self._fit(task, size) for size in smaller)
            block = next((block for block in found if block is not None), None)
        if block is not None:
            self.placed[task.id] = (task, block)
            self.board.take(block)

    def _resume(self, task: Task, block: Block, *, must: bool) -> None:
        """Its step goes on where it has paused, as soon as all of these ranks are free."""
        if self.board.is_free(block):
            self.placed[task.id] = (task, block)
            self.board.take(block)
        elif must:
            self.board.take(block)

    def _make_way(self, task: Task, degree: int, must: bool) -> None:
        """The paused steps that keep ranks from the task go on for its sake."""
        closed = self._closed(task, degree)
        for bits, other in self.waiting:
            if bits & closed:
                self.place(other, must=must)

    def _fit(self, task: Task, degree: int, inside: int | None = None) -> Block | None:
        among = self.board.free if inside is None else inside
        return self.board.fit(degree, task.block, among & ~self._closed(task, degree))

    def _closed(self, task: Task, degree: int) -> int:
        """The ranks with a paused step that the task's can't run beside: of the same model, whose
        modules remember it, or any, if it may pause itself.
        """
        closed = 0
        for bits, other in self.paused:
            if other.model == task.model or self._num_sections(task, degree) > 1:
                closed |= bits
        return closed

    def _num_sections(self, task: Task, degree: int) -> int:
        """In how many sections a step is made, that nobody may have to wait for long."""
        if task.paused is not None:
            return task.paused.sections
        return max(1, math.ceil(task.step_s[degree] / self.config.section_s))

    def grow(self) -> None:
        """Give idle neighbours to those that are done soonest and make good use of them."""
        for task, _ in sorted(self.placed.values(), key=lambda entry: entry[0].least_seconds):
            while self.board.free and self._doubled(task):
                pass

    def batch(self, tasks: Sequence[Task]) -> None:
        """Let those that got no rank join a like one that has one, the first come first."""
        waiting = [
            task
            for task in tasks
            if task.id not in self.placed and task.batch is not None and task.paused is None
        ]
        for task, block in self.placed.values():
            alike = [other for other in waiting if other.batch == task.batch]
            can_join = block.size == 1 and task.paused is None
            joined = alike[: self.config.max_batch - 1] if can_join else []
            self.batches[task.id] = joined
            waiting = [other for other in waiting if other not in joined]

    def steps(self) -> list[Step]:
        """What was placed. A batch takes no longer than its steps one by one, and is not paused."""
        steps = []
        for task, block in self.placed.values():
            joined = self.batches.get(task.id, [])
            sections = 1 if joined else self._num_sections(task, block.size)
            takes_s = task.step_s[block.size] / sections + sum(other.step_s[1] for other in joined)
            ids = tuple(other.id for other in joined)
            steps.append(Step(task.id, block, self.board.now_s + takes_s, ids, sections))
        return steps

    def _degrees(self, task: Task) -> list[int]:
        """Those for whose steps nobody waits too long, smallest first."""
        quick = [degree for degree, step_s in task.sizes if step_s <= self.config.max_step_s]
        if len(quick) > 1:
            return quick
        quickest = quick[0] if quick else min(task.sizes, key=itemgetter(1))[0]
        smaller = [(degree, step_s) for degree, step_s in task.sizes if degree < quickest]
        if smaller and self._may_take(task, smaller[-1][1]):
            return [smaller[-1][0], quickest]
        return [quickest]

    def _may_take(self, task: Task, step_s: float) -> bool:
        """Its steps may be so long, longer than others should have to wait."""
        if step_s > self.config.long_step_s:
            return False
        in_time = task.steps_left * step_s <= task.deadline_s - self.board.now_s
        if not in_time and not self._is_late(task):
            return False
        return all(other == task.id or other in self.placed for other in self._pressed)

    @cached_property
    def _pressed(self) -> list[str]:
        """Who is promised to be in time, waits, and has little to spare."""
        by_s = self.board.now_s + self.config.patience_s
        return [
            task.id
            for due_s, _, task in self.in_time
            if due_s - task.steps_left * task.quickest_s <= by_s and task.id not in self.busy
        ]

    def _is_late(self, task: Task) -> bool:
        """No degree ends in time any more."""
        return task.least_seconds > task.deadline_s - self.board.now_s

    def _degree(self, task: Task, degrees: Collection[int]) -> int:
        """The smallest that leaves time to spare; of who is late, the one that takes the least
        work.
        """
        if self._is_late(task):
            return min(degrees, key=lambda degree: degree * task.step_s[degree])
        enough_s = self.config.hurry * (task.deadline_s - self.board.now_s)
        for degree in degrees:
            if task.steps_left * task.step_s[degree] <= enough_s:
                return degree
        return min(degrees, key=lambda degree: task.step_s[degree])

    def _hold(self, task: Task, degree: int) -> Block | None:
        """Hold the block that is free first; in a free part of it a step may run until then."""
        held = self.board.hold_soonest(degree, task.block, self._closed(task, degree))
        if held is None:
            return None
        inside, free_s = held
        for size, step_s in reversed(task.sizes):
            if size < degree and (block := self._fit(task, size, inside)) is not None:
                return block if self.board.now_s + step_s <= free_s else None
        return None

    def _doubled(self, task: Task) -> bool:
        """Whether the task's block could be made twice as large, which it then is."""
        block = self.placed[task.id][1]
        size = 2 * block.size
        if size not in task.step_s or task.paused is not None:
            return False
        smallest, step_s = task.sizes[0]
        if step_s * smallest < self.config.min_efficiency * task.step_s[size] * size:
            return False
        around = Block(block.first - block.first % size, size)
        if not self.board.is_free_but_for(around, block):
            return False
        if bits_of(around) & self._closed(task, size):
            return False
        self.placed[task.id] = (task, around)
        self.board.take(around)
        return True
