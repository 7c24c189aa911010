"""How many GPU-seconds a tier's pools are asked for, and until when.

Pure: from the job table's groups and the costs of stages. Whoever asks the table does so in one
place; what every replica reported would be counted once for each of them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autoscaling.stage_costs import TierGpus
from autoscaling.tiers import GpuTier
from autoscaling.urgency import UrgencyConfig, judge
from jobs.demand import JobGroup
from models.cost import VideoShape
from models.request import read_stored

SMOOTH_S = 900.0
"""Over which what comes is averaged; a third of the time that is looked back over."""


class Costs(Protocol):
    """What stages take; `stage_costs.StageCosts` in the live cluster."""

    def serves(self, model: str) -> bool:
        """Whether there is such a model."""

    def step_s(self, model: str, shape: VideoShape, gpus: TierGpus) -> Mapping[int, float]:
        """Of one denoise step, by the number of ranks."""

    def step_work_s(self, model: str, shape: VideoShape, gpus: TierGpus) -> float:
        """The least GPU-seconds of a step."""

    def decode_s(self, model: str, shape: VideoShape, tier: GpuTier) -> float:
        """Of one decoder."""


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """Of one tier's denoisers, in GPU-seconds.

    due: in how many seconds how many GPU-seconds are to be done until then, all of those before
    among them, of those who may pull capacity. per_s: those that come a second, one standard error
    above the mean; usual_per_s: those that came at this time of other days. idle_s: how long nobody
    has come. decode_share: a decoder's seconds for each of these GPU-seconds.
    """

    queued_s: float = 0.0
    running_s: float = 0.0
    due: tuple[tuple[float, float], ...] = ()
    per_s: float = 0.0
    usual_per_s: float = 0.0
    idle_s: float = math.inf
    decode_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Horizon:
    """What counts for a pool: who pulls capacity, and from when on a new replica is of use.

    Work that no new replica can end in time is due late_s after one would be there.
    """

    cold_start_s: float
    late_s: float
    pulling_priority: int


def measure_demand(
    gpus: TierGpus,
    open_groups: Iterable[JobGroup],
    arrived: Sequence[JobGroup],
    usual: Sequence[Sequence[JobGroup]],
    costs: Costs,
    urgency: UrgencyConfig,
    horizon: Horizon,
) -> PoolDemand:
    """A tier's. arrived: of the last three SMOOTH_S; usual: by day, of a window of SMOOTH_S."""
    of_tier = _of(gpus, costs)
    here = [group for group in open_groups if of_tier(group)]
    came = [group for group in arrived if of_tier(group)]
    work = {True: 0.0, False: 0.0}
    due: list[tuple[float, float]] = []
    decode_s = 0.0
    for group in here:
        left_s = _work_s(group, gpus, costs) * group.left
        work[group.is_running] += left_s
        decode_s += _decode_s(group, gpus, costs)
        if group.priority >= horizon.pulling_priority:
            due.append((_due_in_s(group, gpus, costs, urgency, horizon), left_s))
    per_s = _per_s(came, gpus, costs, horizon)
    total_s = sum(_work_s(group, gpus, costs) for group in (*here, *came))
    decode_s += sum(_decode_s(group, gpus, costs) for group in came)
    return PoolDemand(
        queued_s=work[False],
        running_s=work[True],
        due=_cumulative(due),
        per_s=per_s,
        usual_per_s=_usual_per_s(usual, gpus, costs, horizon),
        idle_s=min((group.age_s for group in (*here, *came)), default=math.inf),
        decode_share=decode_s / total_s if total_s else 0.0,
    )


def _of(gpus: TierGpus, costs: Costs) -> Callable[[JobGroup], bool]:
    """Those on the tier, of models that are still served."""
    return lambda group: group.tier == gpus.tier and costs.serves(group.model)


def _shape(group: JobGroup) -> VideoShape:
    if group.shape is not None:
        return VideoShape.parse(group.shape)
    return VideoShape.of(read_stored(group.sample or {}))


def _steps(group: JobGroup) -> int:
    if group.shape is not None:
        return group.num_steps
    return read_stored(group.sample or {}).num_steps * group.num_jobs


def _work_s(group: JobGroup, gpus: TierGpus, costs: Costs) -> float:
    return _steps(group) * costs.step_work_s(group.model, _shape(group), gpus)


def _decode_s(group: JobGroup, gpus: TierGpus, costs: Costs) -> float:
    return group.num_jobs * costs.decode_s(group.model, _shape(group), gpus.tier)


def _due_in_s(
    group: JobGroup,
    gpus: TierGpus,
    costs: Costs,
    urgency: UrgencyConfig,
    horizon: Horizon,
) -> float:
    steps = max(1, round(_steps(group) / group.num_jobs))
    step_s = costs.step_s(group.model, _shape(group), gpus)
    judged = judge(
        urgency, priority=group.priority, admitted_s=-group.age_s, num_steps=steps, step_s=step_s
    )
    least_s = steps * group.left * min(step_s.values())
    if judged.deadline_s < least_s + horizon.cold_start_s:
        return max(judged.deadline_s, horizon.cold_start_s + horizon.late_s)
    return judged.deadline_s


def _cumulative(due: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    total, found = 0.0, []
    for due_in_s, work_s in sorted(due):
        total += work_s
        found.append((due_in_s, total))
    return tuple(found)


def _per_s(came: Iterable[JobGroup], gpus: TierGpus, costs: Costs, horizon: Horizon) -> float:
    """With weights that fall by e every SMOOTH_S."""
    mean = squares = 0.0
    for group in came:
        if group.priority >= horizon.pulling_priority:
            work_s, weight = _work_s(group, gpus, costs), math.exp(-group.age_s / SMOOTH_S)
            mean += work_s * weight
            squares += (work_s / group.num_jobs * weight) ** 2 * group.num_jobs
    return (mean + math.sqrt(squares)) / SMOOTH_S


def _usual_per_s(
    usual: Sequence[Sequence[JobGroup]], gpus: TierGpus, costs: Costs, horizon: Horizon
) -> float:
    """So much or less on four of five days."""
    of_tier = _of(gpus, costs)
    rates = [
        sum(
            _work_s(group, gpus, costs)
            for group in day
            if of_tier(group) and group.priority >= horizon.pulling_priority
        )
        / SMOOTH_S
        for day in usual
    ]
    if len(rates) < 2:
        return sum(rates)
    return statistics.quantiles(rates, n=5, method="inclusive")[-1]
