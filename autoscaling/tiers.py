"""GPU tiers: which one a job runs on, by its model and size, capped by the plan."""

from enum import StrEnum

from pydantic import BaseModel

from credits.plans import Plan, PlanForbids
from models.compute import Dtype, WeightStorage
from models.request import InvalidRequest, VideoRequest


class GpuTier(StrEnum):
    """Pools of machines; `local` is whatever this machine has, and no plan limits it."""

    LOCAL = "local"
    T4 = "t4"
    A10G = "a10g"
    A100 = "a100"


LADDER = (GpuTier.T4, GpuTier.A10G, GpuTier.A100)
# What the GPUs of a tier compute in, if nothing else is said.
DTYPES = {GpuTier.LOCAL: Dtype.FLOAT32, GpuTier.T4: Dtype.FLOAT16}
# Of an A100, by the makers' figures for fp16 with sums in fp32: 65, 70 and 312 TFLOP/s.
SPEED = {GpuTier.T4: 65 / 312, GpuTier.A10G: 70 / 312}
HIGHEST = {
    Plan.BASIC: GpuTier.T4,
    Plan.PRO: GpuTier.A10G,
    Plan.ENTERPRISE: GpuTier.A100,
}


class ServedOn(BaseModel, frozen=True, extra="forbid"):
    """A tier that serves a model, for sizes up to max_area pixels (None: any), and how the weights
    of its denoiser lie in that tier's memory; None: whole, or what fits if those do not.
    """

    tier: GpuTier
    max_area: int | None = None
    weights: WeightStorage | None = None

    @property
    def storage(self) -> WeightStorage:
        """How they lie there, once it is decided."""
        return self.weights or WeightStorage.WHOLE


def choose_tier(served_on: tuple[ServedOn, ...], plan: Plan, request: VideoRequest) -> GpuTier:
    """The first listed tier that takes the size; PlanForbids if the plan stops below it."""
    area = request.width * request.height
    for served in served_on:
        if served.max_area is not None and area > served.max_area:
            continue
        if served.tier in LADDER and (
            plan not in HIGHEST or LADDER.index(served.tier) > LADDER.index(HIGHEST[plan])
        ):
            raise PlanForbids(plan, "size", f"the {plan} plan does not include {served.tier} GPUs")
        return served.tier
    raise InvalidRequest("size", f"no GPU tier here serves {request.model} at this size")
