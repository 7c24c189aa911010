"""What the step scheduler knows of a request, and says of its next step."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from autoscaling.rank_blocks import Block


@dataclass(eq=False, slots=True)
class Task:
    """A request, as it is at its next step boundary.

    step_s: seconds of one step by degree, for every degree that it may run at; value: what it is
    worth to finish it by deadline_s; express_from_s: when it begins to overtake whoever is not
    express; block: where its last step ran; batch: requests of the same may make their steps in
    one, None: alone; paused: where a step of it has, what is left of which counts in steps_left.
    Times are seconds on one clock.
    """

    id: str
    arrived_s: float
    deadline_s: float
    express_from_s: float
    steps_left: float
    step_s: Mapping[int, float]
    value: float = 1.0
    block: Block | None = None
    batch: Hashable | None = None
    model: Hashable = None
    paused: "Paused | None" = None
    sizes: list[tuple[int, float]] = field(init=False)
    """step_s, smallest degree first."""
    quickest_s: float = field(init=False)
    """The shortest of its steps."""
    later_s: float = field(init=False, default=-math.inf)
    """The deadline that it was given last for having missed its own."""
    _known: "_LeastWork" = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = sorted(self.step_s.items())
        self.quickest_s = min(self.step_s.values())
        self._known = _LeastWork(-1, 0.0, 0.0, 0.0, None)

    @property
    def least_seconds(self) -> float:
        """What is left at the fastest degree."""
        return self.steps_left * self.quickest_s

    def least_work(self, start_s: float, due_s: float) -> float | None:
        """GPU-seconds at the smallest degree that is done by due_s if it begins at start_s, if one
        is. It is the same for as long as that degree would do, and is not worked out again.
        """
        known = self._known
        if (
            known.steps_left != self.steps_left
            or known.due_s != due_s
            or not known.from_s <= start_s <= known.until_s
        ):
            self._known = known = self._least_work(start_s, due_s)
        return known.work

    def _least_work(self, start_s: float, due_s: float) -> "_LeastWork":
        from_s = -math.inf
        for degree, step_s in self.sizes:
            seconds = self.steps_left * step_s
            if seconds <= due_s - start_s:
                until_s = due_s - seconds
                return _LeastWork(self.steps_left, due_s, from_s, until_s, seconds * degree)
            from_s = max(from_s, math.nextafter(due_s - seconds, math.inf))
        return _LeastWork(self.steps_left, due_s, from_s, math.inf, None)


@dataclass(frozen=True, slots=True)
class Paused:
    """A step of which some sections were made: it goes on there, and nowhere else."""

    block: Block
    sections: int


class _LeastWork(NamedTuple):
    """A task's least work, with so many steps left, if it begins between two moments."""

    steps_left: float
    due_s: float
    from_s: float
    until_s: float
    work: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is under way, or that is to begin now: whose, where, and when it ends.

    batched: others whose steps are made in one with it. sections: this is one of so many that the
    step is made in.
    """

    task_id: str
    block: Block
    ends_s: float
    batched: tuple[str, ...] = ()
    sections: int = 1

    def advance(self, task: Task) -> None:
        """Make its task what it is when this has ended."""
        task.block = self.block
        if self.sections == 1:
            task.steps_left -= 1
            return
        after = math.ceil(task.steps_left) - 1
        sections_left = round((task.steps_left - after) * self.sections) - 1
        task.steps_left = after + sections_left / self.sections
        task.paused = Paused(self.block, self.sections) if sections_left else None
