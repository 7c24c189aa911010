"""Decides at every step boundary which requests run, and on which ranks of a group.

Pure: the denoiser and the cluster simulator run the same. A guaranteed set by Moore and Hodgson's
rule (Management Science 15, 1968) on the fluid relaxation says who can still be in time; those run
first, on aligned blocks whose sizes are powers of two. A request that does not run is parked: it
keeps its state and loses nothing but time.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pydantic import BaseModel, Field


class Block(NamedTuple):
    """`size` neighbouring ranks from `first` on; first is a multiple of size."""

    first: int
    size: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(range(self.first, self.first + self.size))


@dataclass(frozen=True, slots=True)
class Task:
    """A request at a step boundary.

    step_s: seconds of one step by degree, for every degree that it may run at; value: what it is
    worth to finish it by deadline_s; express_from_s: when it begins to overtake whoever is not
    express; block: where its last step ran; batch: requests of the same may make their steps in
    one, None: alone. Times are seconds on one clock.
    """

    id: str
    arrived_s: float
    deadline_s: float
    express_from_s: float
    steps_left: int
    step_s: Mapping[int, float]
    value: float = 1.0
    block: Block | None = None
    batch: Hashable | None = None

    def seconds(self, degree: int) -> float:
        """What is left, at that degree."""
        return self.steps_left * self.step_s[degree]

    def work(self, degree: int) -> float:
        """The same in GPU-seconds."""
        return self.seconds(degree) * degree

    @property
    def least_seconds(self) -> float:
        """What is left at the fastest degree."""
        return min(self.seconds(degree) for degree in self.step_s)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is under way, or that is to begin now: whose, where, and when it ends.

    batched: others whose steps are made in one with it.
    """

    task_id: str
    block: Block
    ends_s: float
    batched: tuple[str, ...] = ()


class StepSchedulerConfig(BaseModel, frozen=True, extra="forbid"):
    """capacity: the share of the GPUs' time that may be promised. hurry: a request runs at the
    smallest degree that ends within this share of the time it has. max_step_s: a degree whose step
    is longer is taken only if there is no quicker one, for so long may everyone else wait.
    hold_s: a block is held free for a request whose slack is not longer than this and a step.
    min_efficiency: idle ranks are given to a request while its steps keep them so busy. max_batch:
    so many requests may make a step in one on a single rank; a video's last bits then depend on
    whom it meets there.
    """

    capacity: float = Field(0.95, gt=0, le=1)
    hurry: float = Field(0.5, gt=0, le=1)
    max_step_s: float = Field(7.6, gt=0)
    hold_s: float = Field(3.0, ge=0)
    min_efficiency: float = Field(0.8, ge=0)
    max_batch: int = Field(1, ge=1)


def next_steps(
    now_s: float,
    num_ranks: int,
    tasks: Iterable[Task],
    under_way: Sequence[Step],
    config: StepSchedulerConfig,
) -> list[Step]:
    """The steps that begin now, on ranks where none is under way.

    tasks: those at a step boundary; one whose step is under way is not among them. ValueError if a
    task has no degree that num_ranks allows.
    """
    tasks = [_fitted(task, num_ranks) for task in tasks]
    board = _Board(now_s, num_ranks, under_way, config)
    express = [task for task in tasks if task.express_from_s <= now_s]
    in_time = guaranteed(now_s, num_ranks, tasks, config)
    express.sort(key=_by_deadline)
    promised = [task for task in in_time if task not in express]
    rest = [task for task in tasks if task not in express and task not in in_time]
    rest.sort(key=lambda task: _effort(task, now_s))
    for task in express:
        board.place(task, must=True)
    for task in promised:
        board.place(task, must=board.is_urgent(task))
    for task in rest:
        board.place(task, must=False)
    board.grow()
    board.batch([*express, *promised, *rest])
    return board.steps()


def _fitted(task: Task, num_ranks: int) -> Task:
    """The task with no degree but those that there are ranks for."""
    step_s = {degree: step_s for degree, step_s in task.step_s.items() if degree <= num_ranks}
    if not step_s:
        raise ValueError(f"task {task.id} runs at {sorted(task.step_s)} of {num_ranks} ranks")
    return replace(task, step_s=step_s)


def guaranteed(
    now_s: float, num_ranks: int, tasks: Iterable[Task], config: StepSchedulerConfig
) -> list[Task]:
    """The tasks that can all be in time, as far as GPU-seconds tell, by deadline.

    Where they can't all be, those worth least for their work are left out.
    """
    kept: list[tuple[Task, float]] = []
    total = 0.0
    for task in sorted(tasks, key=_by_deadline):
        left_s = task.deadline_s - now_s
        works = [task.work(degree) for degree in task.step_s if task.seconds(degree) <= left_s]
        if not works:
            continue
        kept.append((task, min(works)))
        total += min(works)
        while total > config.capacity * num_ranks * left_s:
            least = min(kept, key=lambda entry: entry[0].value / entry[1])
            kept.remove(least)
            total -= least[1]
    return [task for task, _ in kept]


def _by_deadline(task: Task) -> tuple[float, float, str]:
    """A fixed order: who is at work stays at work until someone with less time comes."""
    return (task.deadline_s, task.arrived_s, task.id)


def _effort(task: Task, now_s: float) -> tuple[float, str]:
    """Of those with no promise: the least work for its value first, and less with every wait."""
    work = min(task.work(degree) for degree in task.step_s)
    lateness = max(0.0, now_s - task.deadline_s) / (20 * task.least_seconds)
    return (work / task.value / (1 + lateness), task.id)


class _Board:
    """Which rank is taken from now on, and until when those are that are under way."""

    def __init__(
        self,
        now_s: float,
        num_ranks: int,
        under_way: Sequence[Step],
        config: StepSchedulerConfig,
    ) -> None:
        self.now_s = now_s
        self.num_ranks = num_ranks
        self.config = config
        self.free_from_s = [now_s] * num_ranks
        for step in under_way:
            for rank in step.block.ranks:
                self.free_from_s[rank] = max(step.ends_s, math.nextafter(now_s, math.inf))
        self.held: set[int] = set()
        self.placed: dict[str, tuple[Task, Block]] = {}
        self.batches: dict[str, list[Task]] = {}

    def is_urgent(self, task: Task) -> bool:
        """It can't wait for much longer than the longest step."""
        slack_s = task.deadline_s - self.now_s - task.least_seconds
        return slack_s <= self.config.max_step_s + self.config.hold_s

    def place(self, task: Task, *, must: bool) -> None:
        """Give the task a free block; if it must run and there is none, hold one for it."""
        degree = self._degree(task)
        block = self._free_block(task, degree)
        if block is None and must:
            block = self._hold(task, degree)
        elif block is None:
            smaller = (self._free_block(task, size) for size in self._degrees(task, below=degree))
            block = next((found for found in smaller if found is not None), None)
        if block is not None:
            self.placed[task.id] = (task, block)
            self.held.update(block.ranks)

    def grow(self) -> None:
        """Give idle neighbours to those that are done soonest and make good use of them."""
        for task, _ in sorted(self.placed.values(), key=lambda entry: entry[0].least_seconds):
            while self._doubled(task):
                pass

    def batch(self, tasks: Sequence[Task]) -> None:
        """Let those that got no rank join a like one that has one, the first come first."""
        waiting = [task for task in tasks if task.id not in self.placed and task.batch is not None]
        for task, block in self.placed.values():
            alike = [other for other in waiting if other.batch == task.batch]
            joined = alike[: self.config.max_batch - 1] if block.size == 1 else []
            self.batches[task.id] = joined
            waiting = [other for other in waiting if other not in joined]

    def steps(self) -> list[Step]:
        """What was placed. A batch takes no longer than its steps one by one."""
        steps = []
        for task, block in self.placed.values():
            joined = self.batches[task.id]
            takes_s = task.step_s[block.size] + sum(other.step_s[1] for other in joined)
            ids = tuple(other.id for other in joined)
            steps.append(Step(task.id, block, self.now_s + takes_s, ids))
        return steps

    def _degree(self, task: Task) -> int:
        """The smallest that is quick enough, both for the deadline and for those who wait.

        Where no degree can be in time any more, the one that takes the least work.
        """
        degrees = list(self._degrees(task))
        short = [size for size in degrees if task.step_s[size] <= self.config.max_step_s]
        sizes = short or [min(degrees, key=lambda size: task.step_s[size])]
        left_s = task.deadline_s - self.now_s
        if min(task.seconds(size) for size in sizes) > left_s:
            return min(sizes, key=task.work)
        quick = [size for size in sizes if task.seconds(size) <= self.config.hurry * left_s]
        return min(quick) if quick else min(sizes, key=lambda size: task.step_s[size])

    def _degrees(self, task: Task, below: int | None = None) -> Iterator[int]:
        """The task's, largest first."""
        sizes = sorted(task.step_s, reverse=True)
        return (size for size in sizes if below is None or size < below)

    def _free_block(self, task: Task, size: int) -> Block | None:
        """Where it ran before, else where it breaks up least of what is free."""
        free = [block for block in self._blocks(size) if self._is_free(block)]
        if task.block in free:
            return task.block
        return min(free, key=lambda block: (self._free_around(block), block), default=None)

    def _free_around(self, block: Block) -> int:
        """The free ranks of the largest free block around it."""
        size, largest = block.size, block.size
        while (size := size * 2) <= self.num_ranks:
            around = Block(block.first - block.first % size, size)
            if not self._is_free(around):
                break
            largest = size
        return largest

    def _hold(self, task: Task, degree: int) -> Block | None:
        """Hold the block that is free first; in a free part of it a step may run until then."""
        blocks = [block for block in self._blocks(degree) if self.held.isdisjoint(block.ranks)]
        if not blocks:
            return None
        first = min(blocks, key=lambda block: (self._free_at(block), block != task.block, block))
        free_s = self._free_at(first)
        self.held.update(first.ranks)
        for size in self._degrees(task, below=degree):
            for block in self._blocks(size):
                inside = set(block.ranks) <= set(first.ranks)
                if inside and self._free_at(block) <= self.now_s:
                    ends_s = self.now_s + task.step_s[size]
                    return block if ends_s <= free_s else None
        return None

    def _doubled(self, task: Task) -> bool:
        """Whether the task's block could be made twice as large, which it then is."""
        block = self.placed[task.id][1]
        size = 2 * block.size
        if size not in task.step_s:
            return False
        smallest = min(task.step_s)
        efficiency = task.step_s[smallest] * smallest / (task.step_s[size] * size)
        around = Block(block.first - block.first % size, size)
        others = set(around.ranks) - set(block.ranks)
        idle = all(self._rank_is_free(rank) for rank in others)
        if not idle or efficiency < self.config.min_efficiency:
            return False
        self.placed[task.id] = (task, around)
        self.held.update(others)
        return True

    def _blocks(self, size: int) -> Iterator[Block]:
        return (Block(first, size) for first in range(0, self.num_ranks - size + 1, size))

    def _free_at(self, block: Block) -> float:
        return max(self.free_from_s[rank] for rank in block.ranks)

    def _is_free(self, block: Block) -> bool:
        return all(self._rank_is_free(rank) for rank in block.ranks)

    def _rank_is_free(self, rank: int) -> bool:
        """Of the numbers past the last rank, none is."""
        taken = rank >= self.num_ranks or rank in self.held
        return not taken and self.free_from_s[rank] <= self.now_s
