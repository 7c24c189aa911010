"""When a denoise is due and what it is worth to be in time, by the plan that pays for it.

Pure: the denoiser and the cluster simulator run the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, Field


class PlanUrgency(BaseModel, frozen=True, extra="forbid"):
    """scale: due after so many times the time that the steps take; value: of being in time."""

    scale: float = Field(gt=0)
    value: float = Field(gt=0)


class UrgencyConfig(BaseModel, frozen=True, extra="forbid"):
    """by_priority: of the plans, lowest first; a higher priority counts as the last.

    base_s: what every request has besides. express_priority: from this plan on a request overtakes
    those of other plans; ageing_s: any request does after so long. work_exponent: a request's work
    counts for its value to this power: 0: every request is worth the same, however long its video;
    below 1, or the longest would always go first.
    """

    base_s: float = Field(2.0, ge=0)
    by_priority: tuple[PlanUrgency, ...] = Field(
        (
            PlanUrgency(scale=7.5, value=1.0),
            PlanUrgency(scale=5.0, value=2.0),
            PlanUrgency(scale=2.5, value=4.0),
            PlanUrgency(scale=1.5, value=8.0),
        ),
        min_length=1,
    )
    express_priority: int = Field(3, ge=0)
    ageing_s: float = Field(600.0, gt=0)
    work_exponent: float = Field(0.8, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Urgency:
    """Of one request; times are seconds on the clock on which it was admitted."""

    deadline_s: float
    express_from_s: float
    value: float


MIN_EFFICIENCY = 0.8


def judge(
    config: UrgencyConfig,
    *,
    priority: int,
    admitted_s: float,
    num_steps: int,
    step_s: Mapping[int, float],
) -> Urgency:
    """The urgency of a request with so many steps of step_s seconds by degree."""
    plan = config.by_priority[min(priority, len(config.by_priority) - 1)]
    least = min(step_s)
    work = num_steps * least * step_s[least]
    efficient = [
        seconds
        for degree, seconds in step_s.items()
        if least * step_s[least] / (degree * seconds) >= MIN_EFFICIENCY
    ]
    express = priority >= config.express_priority
    return Urgency(
        deadline_s=admitted_s + config.base_s + plan.scale * num_steps * min(efficient),
        express_from_s=admitted_s if express else admitted_s + config.ageing_s,
        value=plan.value * math.pow(work, config.work_exponent),
    )
