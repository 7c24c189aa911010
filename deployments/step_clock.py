"""How long the steps of a group's ranks take, and after how long one of them hangs."""

from dataclasses import replace

from autoscaling.rank_blocks import Block
from autoscaling.step_times import StepTimes
from deployments.config import HangConfig
from deployments.rank_group import RankGroup
from deployments.ways import Way
from parallel.plan import P4D, ParallelPlan, StepShape, Topology, predict_step


class StepClock:
    """An A100's speeds, which measured steps correct."""

    def __init__(self, group: RankGroup, hang: HangConfig) -> None:
        self.group = group
        self.hang = hang
        self.times = StepTimes()
        self.warm: set[tuple[str, StepShape, ParallelPlan, Block]] = set()

    @property
    def topology(self) -> Topology:
        """The group's."""
        return replace(P4D, gpus_per_node=self.group.ranks_per_node)

    def begin_generation(self) -> None:
        """The ranks are new processes."""
        self.warm.clear()

    def expect(self, model: str, way: Way) -> dict[int, float]:
        """Seconds a step, by degree."""
        return {degree: self._expect(model, way.shape, plan) for degree, plan in way.plans.items()}

    def limit_s(self, model: str, way: Way, block: Block) -> float:
        """After so long a step hangs. New processes, and ranks that meet for the first time, may
        take longer than steps of their like have taken.
        """
        shape, plan = way.shape, way.plans[block.size]
        is_cold = (model, shape, plan, block) not in self.warm
        if is_cold or self.times.known(model, shape, plan.degree) < self.hang.known_steps:
            return self.hang.first_s
        return max(self.hang.least_s, self.hang.factor * self._expect(model, shape, plan))

    def note(self, model: str, way: Way, block: Block, took_s: float | None) -> None:
        """The ranks ran the model; took_s: None if it was for several requests."""
        shape, plan = way.shape, way.plans[block.size]
        self.warm.add((model, shape, plan, block))
        if took_s is not None:
            predicted_s = self._predict(shape, plan)
            self.times.observe(model, shape, plan.degree, predicted_s=predicted_s, took_s=took_s)

    def _predict(self, shape: StepShape, plan: ParallelPlan) -> float:
        return predict_step(shape, plan, self.topology).step_s

    def _expect(self, model: str, shape: StepShape, plan: ParallelPlan) -> float:
        predicted_s = self._predict(shape, plan)
        return self.times.expect(model, shape, plan.degree, predicted_s=predicted_s)
