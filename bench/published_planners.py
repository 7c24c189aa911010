"""Schedulers that others have published and that choose by an optimisation, for the simulator.

TridentServe's integer programme, TetriServe's and GENSERVE's dynamic programmes come to the same on
one node: at most one option for each request, as many GPUs as there are, the largest sum. That is
solved exactly here. As in `published_schedulers`, each is taken to aligned blocks and video steps.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from autoscaling.simulated_cluster import StepPolicy
from autoscaling.tasks import Step, Task
from bench.published_schedulers import Turn, best_degree, efficient_degrees, seconds

Option = tuple[int, float]
"""GPUs, and what it is worth to give a request so many."""


def choose(options: Sequence[Sequence[Option]], gpus: int) -> list[int]:
    """Of each request's options the GPUs of the chosen one, 0 for none; the largest worth in all.

    Among equal ones the fewest GPUs; what is not among a request's options is worth nothing.
    """
    worth = [0.0] * (gpus + 1)
    picks: list[list[int]] = []
    for entries in options:
        given = entries if any(count == 0 for count, _ in entries) else (*entries, (0, 0.0))
        after, picked = [], []
        for budget in range(gpus + 1):
            gain, count = max(
                (worth[budget - count] + gain, -count) for count, gain in given if count <= budget
            )
            after.append(gain)
            picked.append(-count)
        worth = after
        picks.append(picked)
    budget = next(count for count in range(gpus + 1) if worth[count] >= worth[gpus] - 1e-9)
    chosen = []
    for picked in reversed(picks):
        chosen.append(picked[budget])
        budget -= picked[budget]
    return chosen[::-1]


def place(turn: Turn, chosen: Iterable[tuple[Task, int]]) -> list[Task]:
    """Begin their steps, the largest blocks first; those that did not fit."""
    left = []
    for task, degree in sorted(chosen, key=lambda entry: -entry[1]):
        if not turn.begin(task, degree):
            left.append(task)
    return left


def spare(turn: Turn) -> int:
    """Ranks that are free."""
    return turn.board.free.bit_count()


@dataclass(frozen=True, slots=True)
class TridentServe:
    """The dispatch of arXiv:2510.02838 (`multi_machine_efficient_ilp.py` of PKU-DAIR/Hetu-DiT).

    Requests run to their end at a degree that keeps its ranks busy to 80 %. One that is in time is
    worth 1000, a late one 500 less its lateness in seconds, an idle GPU -1. Long videos have a
    least degree, by their volume there, by their step's time here.
    """

    least_degrees: tuple[tuple[float, int], ...] = ((2.69, 2), (6.32, 4), (17.3, 8))

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """Those that run go on; of the others those that the programme chooses begin."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        fresh = turn.go_on()
        gpus = spare(turn)
        if gpus and fresh:
            options = [self._options(task, num_ranks, now_s) for task in fresh]
            chosen = choose(options, gpus)
            place(turn, [(task, count) for task, count in zip(fresh, chosen, strict=True) if count])
        return turn.begun

    def _options(self, task: Task, num_ranks: int, now_s: float) -> list[Option]:
        smallest, step_s = task.sizes[0]
        alone_s = smallest * step_s
        least = max((degree for step, degree in self.least_degrees if alone_s > step), default=1)
        found = []
        for degree in efficient_degrees(task, num_ranks):
            if degree >= least:
                late_s = now_s + seconds(task, degree) - task.deadline_s
                found.append((degree, degree + (1000.0 if late_s <= 0 else max(1.0, 500 - late_s))))
        return found


@dataclass(slots=True)
class TetriServe:
    """Deadline rounds (arXiv:2510.01565): in every round of round_s the GPUs go to requests so that
    as many as possible can still be in time after it; what is left over goes to whoever gains.

    A step may last longer than a round. in_rounds: no choice is made between rounds; otherwise at
    every event, for the next round_s.
    """

    round_s: float = 10.0
    in_rounds: bool = True
    ends_s: float = -math.inf
    degrees: dict[str, int] = field(default_factory=dict)

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """Inside of a round those that were chosen go on as chosen."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        if not turn.board.free:
            return []
        waiting = sorted(turn.waiting, key=lambda task: task.deadline_s)
        if self.in_rounds and now_s < self.ends_s:
            going = [task for task in waiting if task.id in self.degrees]
            place(turn, [(task, self.degrees[task.id]) for task in going])
            self._fill(turn, [task for task in turn.waiting if task.id not in self.degrees])
            return turn.begun
        self.ends_s = now_s + self.round_s
        able = [t for t in waiting if now_s + t.least_seconds <= t.deadline_s]
        chosen = choose([self._options(task, now_s) for task in able], spare(turn))
        picked = [(task, count) for task, count in zip(able, chosen, strict=True) if count]
        place(turn, picked)
        begun = {step.task_id for step in turn.begun}
        self._fill(turn, [task for task in able if task.id not in begun])
        late = [task for task in waiting if now_s + task.least_seconds > task.deadline_s]
        self._fill(turn, late)
        self.degrees = {step.task_id: step.block.size for step in turn.begun}
        return turn.begun

    def _options(self, task: Task, now_s: float) -> list[Option]:
        """Worth 1 where it can be in time after the round; without GPUs, too, if it has the time.

        A GPU costs a little, so that of two ways the smaller is taken.
        """
        then_s = now_s + self.round_s
        waits = then_s + task.least_seconds <= task.deadline_s
        found = [(0, 1.0 if waits else 0.0)]
        for degree, step_s in task.sizes:
            steps = min(task.steps_left, max(1, int(self.round_s / step_s)))
            done_s = now_s + max(self.round_s, step_s) if steps < task.steps_left else now_s
            left_s = (task.steps_left - steps) * task.quickest_s
            ends_s = done_s + left_s if steps < task.steps_left else now_s + steps * step_s
            survives = ends_s <= task.deadline_s
            found.append((degree, (1.0 if survives else 0.0) - 1e-3 * degree))
        return found

    def _fill(self, turn: Turn, tasks: Iterable[Task]) -> None:
        """Idle GPUs to those that were left out, at the degree that suits them best."""
        for task in tasks:
            for degree in reversed(efficient_degrees(task, turn.num_ranks)):
                if turn.begin(task, degree):
                    break


@dataclass(slots=True)
class GenServe:
    """Two stages (arXiv:2604.04335): of every request a few options about what it has now: go on,
    pause, resume, twice or half the GPUs; a dynamic programme takes those with which most are in
    time. One is paused only where another, that can wait no longer, has no GPU.
    """

    patience_s: float = 5.0

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        """At step boundaries."""
        turn = Turn.of(now_s, num_ranks, tasks, under_way)
        if not turn.board.free:
            return []
        waiting = sorted(turn.waiting, key=lambda task: task.deadline_s)
        urgent = any(
            task.block is None and 0 <= self._slack_s(task, now_s) <= self.patience_s
            for task in waiting
        )
        options = [self._options(task, num_ranks, now_s, may_pause=urgent) for task in waiting]
        chosen = choose(options, spare(turn))
        place(turn, [(task, count) for task, count in zip(waiting, chosen, strict=True) if count])
        return turn.begun

    @staticmethod
    def _slack_s(task: Task, now_s: float) -> float:
        return task.deadline_s - now_s - task.least_seconds

    def _options(
        self, task: Task, num_ranks: int, now_s: float, *, may_pause: bool
    ) -> list[Option]:
        best = best_degree(task, num_ranks)
        if task.block is None:
            degrees, waits = {best, max(1, best // 2)}, 0.0
        else:
            size = task.block.size
            degrees, waits = {size, 2 * size, max(1, size // 2)}, 0.0 if may_pause else -100.0
        if self._slack_s(task, now_s) > self.patience_s:
            waits += 0.9  # it can be in time later
        found = [(0, waits)]
        for degree in sorted(degrees & set(task.step_s)):
            in_time = now_s + seconds(task, degree) <= task.deadline_s
            found.append((degree, (1.0 if in_time else 0.1) - 1e-3 * degree))
        return found


PLANNERS: dict[str, Callable[[], StepPolicy]] = {
    "tridentserve": TridentServe,
    "tetriserve-10": lambda: TetriServe(10.0),
    "tetriserve-event": lambda: TetriServe(20.0, in_rounds=False),
    "tetriserve-event-2": lambda: TetriServe(2.0, in_rounds=False),
    "genserve": GenServe,
}
"""GENSERVE has no row in the trial, where it was not written; nor has a look ahead of 2 s, which is
better than any there and is shown for that.
"""
PLANNERS_IN_TRIAL = {
    "tridentserve": 0.557,
    "tetriserve-10": 0.681,
    "tetriserve-event": 0.720,
}
