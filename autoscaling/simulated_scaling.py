"""The live scaling rules, for nodes of the simulated cluster."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from autoscaling.demand import SMOOTH_S, measure_demand
from autoscaling.pool_scaling import PoolScaling, Wanted, wanted_denoisers
from autoscaling.simulated_cluster import Fleet, Job
from autoscaling.stage_costs import TierGpus
from autoscaling.tiers import GpuTier
from autoscaling.urgency import UrgencyConfig
from autoscaling.workloads import KINDS, VideoKind
from credits.plans import PlanTable
from jobs.demand import AGE_MS, OLD_AGE_MS, OLD_MS, JobGroup
from models.cost import VideoShape

NODE = TierGpus(GpuTier.A100, 8)


class KindCosts:
    """Step times of the workloads' kinds, which are named as models."""

    def __init__(self, kinds: Iterable[VideoKind] = KINDS) -> None:
        self.kinds = {kind.name: kind for kind in kinds}

    def serves(self, model: str) -> bool:
        """Every kind."""
        return model in self.kinds

    def step_s(self, model: str, _shape: VideoShape, _gpus: TierGpus) -> Mapping[int, float]:
        """As published."""
        return self.kinds[model].measured_s

    def step_work_s(self, model: str, _shape: VideoShape, _gpus: TierGpus) -> float:
        """On one GPU."""
        return self.kinds[model].measured_s[1]

    def decode_s(self, _model: str, _shape: VideoShape, _tier: GpuTier) -> float:
        """Nothing: decoders are not simulated."""
        return 0.0


class ServeDelays:
    """Ray Serve's own rule of when a wish becomes a target."""

    def __init__(self, up_s: float, down_s: float, most: int = 64) -> None:
        self.config = AutoscalingConfig(
            min_replicas=0, max_replicas=most, upscale_delay_s=up_s, downscale_delay_s=down_s
        )
        self.state: dict[str, Any] = {}

    def apply(self, wanted: int, now: int, moment_s: float) -> int:
        """The target, of a wish and the target until now."""
        wanted = min(wanted, self.config.max_replicas)
        target, self.state = _apply_delay_logic(wanted, now, self.config, self.state, moment_s)
        return target


@dataclass
class ByDemandScaling:
    """Ours: what the live pipeline works out every few seconds, of the simulated job table."""

    urgency: UrgencyConfig
    config: PoolScaling = field(default_factory=PoolScaling)
    plans: PlanTable = field(default_factory=PlanTable)
    delays: ServeDelays = field(default_factory=lambda: ServeDelays(0.0, 300.0))
    costs: KindCosts = field(default_factory=KindCosts)
    shapes: dict[str, str] = field(default_factory=dict)
    num_old: int = 0

    def nodes(self, fleet: Fleet) -> int:
        """With Serve's delays."""
        now = fleet.ready + len(fleet.coming_s)
        return self.delays.apply(self.wanted(fleet).replicas, now, fleet.now_s)

    def wanted(self, fleet: Fleet) -> Wanted:
        """By the live functions."""
        jobs = fleet.jobs
        while self.num_old < len(jobs) and _age_s(jobs[self.num_old], fleet) >= 3 * SMOOTH_S:
            self.num_old += 1
        demand = measure_demand(
            NODE,
            self._groups(fleet.open_jobs, fleet, left=True),
            self._groups(jobs[self.num_old :], fleet, left=False),
            [],
            self.costs,
            self.urgency,
            self.config.horizon,
        )
        return wanted_denoisers(demand, NODE.count, fleet.ready, fleet.coming_s, self.config)

    def _groups(self, jobs: Collection[Job], fleet: Fleet, *, left: bool) -> list[JobGroup]:
        """As `jobs.demand` counts them; of those that are open what is left."""
        counted: Counter[tuple[str, int, float]] = Counter()
        steps: Counter[tuple[str, int, float]] = Counter()
        for job in jobs:
            priority = self.plans.limits[job.asked.plan].priority
            key = (job.asked.kind.name, priority, _coarse(_age_s(job, fleet)))
            counted[key] += 1
            steps[key] += math.ceil(job.task.steps_left) if left else job.asked.kind.num_steps
        return [
            JobGroup(
                tier=NODE.tier,
                model=name,
                shape=self._shape(name),
                sample=None,
                priority=priority,
                is_running=False,
                age_s=age_s,
                num_jobs=num_jobs,
                num_steps=(planned := num_jobs * self.costs.kinds[name].num_steps),
                left=steps[name, priority, age_s] / planned,
            )
            for (name, priority, age_s), num_jobs in counted.items()
        ]

    def _shape(self, name: str) -> str:
        if name not in self.shapes:
            kind = self.costs.kinds[name]
            shape = VideoShape(kind.num_frames, kind.width, kind.height, 1, guided=True)
            self.shapes[name] = str(shape)
        return self.shapes[name]


def _age_s(job: Job, fleet: Fleet) -> float:
    return fleet.now_s - job.asked.arrived_s


def _coarse(age_s: float) -> float:
    """As the job table's query rounds it."""
    unit_s = (AGE_MS if age_s * 1000 < OLD_MS else OLD_AGE_MS) / 1000
    return age_s - age_s % unit_s
