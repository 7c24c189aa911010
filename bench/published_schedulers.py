"""The schedulers that others have published, for the simulator: what ours is compared with.

Each is written from its paper or its code, taken to aligned blocks of one node and to steps of
videos. None of them is used by the cluster.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from autoscaling.rank_blocks import Block, RankBoard
from autoscaling.simulated_cluster import StepPolicy
from autoscaling.tasks import Step, Task

EFFICIENT = 0.8
# In time of W1 at load 0.7, in the trial that this project's simulator follows: 3 x 400 requests.
IN_TRIAL = {
    "fifo-1": 0.362,
    "fifo-2": 0.410,
    "fifo-4": 0.424,
    "fifo-8": 0.332,
    "best-degree-fifo": 0.212,
    "best-degree-sjf": 0.502,
    "best-degree-edf": 0.408,
    "srtf-step": 0.881,
    "ddit": 0.413,
}


def efficient_degrees(task: Task, num_ranks: int) -> list[int]:
    """Those whose ranks are kept busy to EFFICIENT, smallest first."""
    smallest, step_s = task.sizes[0]
    return [
        degree
        for degree, seconds in task.sizes
        if degree <= num_ranks and smallest * step_s >= EFFICIENT * degree * seconds
    ]


def best_degree(task: Task, num_ranks: int) -> int:
    """The largest of those."""
    return efficient_degrees(task, num_ranks)[-1]


def seconds(task: Task, degree: int) -> float:
    """What is left, at that degree."""
    return task.steps_left * task.step_s[degree]


@dataclass(slots=True)
class Turn:
    """One call of a policy: the board, who waits at a boundary, and what was begun."""

    now_s: float
    num_ranks: int
    board: RankBoard
    waiting: list[Task]
    begun: list[Step] = field(default_factory=list)

    @classmethod
    def of(
        cls, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> "Turn":
        """Whoever has a step under way does not wait."""
        busy = {step.task_id for step in under_way}
        board = RankBoard(now_s, num_ranks, [(step.block, step.ends_s) for step in under_way])
        return cls(now_s, num_ranks, board, [task for task in tasks if task.id not in busy])

    def begin(self, task: Task, degree: int) -> bool:
        """A step at that degree, if there is a block for it."""
        block = self.board.fit(degree, task.block)
        if block is None:
            return False
        self.board.take(block)
        self.begun.append(Step(task.id, block, self.now_s + task.step_s[degree]))
        return True

    def go_on(self) -> list[Task]:
        """Continue, where they are, those that have begun; the others."""
        fresh = []
        for task in self.waiting:
            if task.block is None:
                fresh.append(task)
            elif not self.begin(task, task.block.size):
                raise AssertionError(f"task {task.id} lost its ranks")
        return fresh


@dataclass(frozen=True, slots=True)
class ToTheEnd:
    """Requests begin in some order, at a degree of their own, and keep their ranks to the end.

    passes: whether those that fit go past one that waits for its ranks.
    """

    degree: Callable[[Task, int], int]
    order: Callable[[Task], float]
    passes: bool = False

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """Of those that run, and of the first in the queue while there is a block."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        fresh = turn.go_on()
        if turn.board.free:
            for task in sorted(fresh, key=self.order):
                if not turn.begin(task, self.degree(task, num_ranks)) and not self.passes:
                    break
        return turn.begun


def fixed(degree: int) -> Callable[[Task, int], int]:
    """Everyone's degree, or the next that a task has, smaller if there is one."""
    return lambda task, num_ranks: max(
        (size for size, _ in task.sizes if size <= min(degree, num_ranks)),
        default=task.sizes[0][0],
    )


def by_arrival(task: Task) -> float:
    """First come, first served."""
    return task.arrived_s


def by_deadline(task: Task) -> float:
    """Earliest deadline first."""
    return task.deadline_s


def by_length(task: Task) -> float:
    """Shortest job first, at its best degree."""
    return seconds(task, best_degree(task, task.sizes[-1][0]))


@dataclass(frozen=True, slots=True)
class ShortestRemaining:
    """The shortest remaining time first, at every step boundary, each at its best degree or, where
    there is no block for that, at the largest smaller one.
    """

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """Preempts at step boundaries."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        if not turn.board.free:
            return []
        ranked = [(seconds(t, best_degree(t, num_ranks)), t) for t in turn.waiting]
        for _, task in sorted(ranked, key=lambda entry: entry[0]):
            if not turn.board.free:
                break
            best = best_degree(task, num_ranks)
            for degree, _ in reversed(task.sizes):
                if degree <= best and turn.begin(task, degree):
                    break
        return turn.begun


@dataclass(slots=True)
class DDiT:
    """Hungry first (arXiv:2506.13497; `videosys/core/scheduler.py`).

    A request begins with the largest power of two of ranks that is free, up to its best degree;
    with less it is hungry, and is given more at its boundaries, the most starved one first. Nobody
    is preempted, no degree shrinks, and the queue is first come first served.
    """

    promoted_at: dict[str, float] = field(default_factory=dict)

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """Running ones go on, on more ranks if they are hungry and there are some."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        running = [task for task in turn.waiting if task.block is not None]
        fresh = [task for task in turn.waiting if task.block is None]
        hungry = []
        for task in running:
            best = best_degree(task, num_ranks)
            assert task.block is not None
            if task.block.size < best:
                hungry.append((-self._starvation(task, best), task))
            turn.begin(task, task.block.size)
        for _, task in sorted(hungry, key=lambda entry: entry[0]):
            self._promote(turn, task)
        for task in sorted(fresh, key=by_arrival):
            size = best_degree(task, num_ranks)
            while size and not (size in task.step_s and turn.begin(task, size)):
                size //= 2
            if not size:
                break
            self.promoted_at[task.id] = task.steps_left
        return turn.begun

    def _starvation(self, task: Task, best: int) -> float:
        assert task.block is not None
        made = self.promoted_at[task.id] - task.steps_left
        return made * (task.step_s[task.block.size] - task.step_s[best])

    def _promote(self, turn: Turn, task: Task) -> None:
        """To the largest block around its own that is otherwise free, up to the best degree."""
        index = next(n for n, step in enumerate(turn.begun) if step.task_id == task.id)
        block = turn.begun[index].block
        best = best_degree(task, turn.num_ranks)
        while block.size < best:
            size = block.size * 2
            around = Block(block.first - block.first % size, size)
            if not turn.board.is_free_but_for(around, block):
                break
            block = around
        if block.size > turn.begun[index].block.size:
            turn.board.take(block)
            turn.begun[index] = Step(task.id, block, turn.now_s + task.step_s[block.size])
            if block.size < best:
                self.promoted_at[task.id] = task.steps_left


POLICIES: dict[str, Callable[[], StepPolicy]] = {
    **{f"fifo-{k}": functools.partial(ToTheEnd, fixed(k), by_arrival) for k in (1, 2, 4, 8)},
    "best-degree-fifo": functools.partial(ToTheEnd, best_degree, by_arrival),
    "best-degree-sjf": functools.partial(ToTheEnd, best_degree, by_length),
    "best-degree-edf": functools.partial(ToTheEnd, best_degree, by_deadline, passes=True),
    "srtf-step": ShortestRemaining,
    "ddit": DDiT,
}
