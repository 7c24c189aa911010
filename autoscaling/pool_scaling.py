"""How many replicas the pools of a tier are to have, and why.

Pure: the live cluster and the simulator run the same. Delays, factors and bounds are Ray Serve's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, Field

from autoscaling.demand import SMOOTH_S, Horizon, PoolDemand


class PoolScaling(BaseModel, frozen=True, extra="forbid"):
    """load: the share of a replica's time that is planned with. cold_start_s: from asking for one
    to its first step, its node included. late_s: what can't be in time any more may take so long.
    keep_warm_s: one replica is wanted for so long after the last request came. pulling_priority: a
    plan of a lower priority gets what the others leave, and one replica at least. usual_days: what
    came on so many days at this time is expected again; 0: nothing is.
    """

    load: float = Field(0.8, gt=0, le=1)
    cold_start_s: float = Field(240.0, ge=0)
    late_s: float = Field(600.0, gt=0)
    keep_warm_s: float = Field(600.0, ge=0, le=3 * SMOOTH_S)
    pulling_priority: int = Field(0, ge=0)
    usual_days: int = Field(7, ge=0, le=28)

    @property
    def horizon(self) -> Horizon:
        """What of it the demand depends on."""
        return Horizon(self.cold_start_s, self.late_s, self.pulling_priority)


class Reason(StrEnum):
    """What wants the most replicas."""

    IDLE = "idle"
    WARM = "warm"
    OPEN = "open"
    COMING = "coming"
    USUAL = "usual"
    DUE = "due"
    DENOISERS = "denoisers"


@dataclass(frozen=True, slots=True)
class Wanted:
    """replicas of a pool, for a reason that `why` tells in words."""

    replicas: int
    reason: Reason
    why: str


def wanted_denoisers(
    demand: PoolDemand,
    gpus: int,
    ready: int,
    coming_s: Sequence[float],
    config: PoolScaling,
) -> Wanted:
    """Whole replicas of so many GPUs each. ready: those that work; coming_s: in how many seconds
    each of the others will.
    """
    per_replica = gpus * config.load
    found = [Wanted(0, Reason.IDLE, f"nobody has come for {config.keep_warm_s:g} s")]
    if demand.idle_s < config.keep_warm_s:
        why = f"the last request came {demand.idle_s:.0f} s ago"
        found.append(Wanted(1, Reason.WARM, why))
    open_s = demand.queued_s + demand.running_s
    if open_s > 0:
        found.append(Wanted(1, Reason.OPEN, f"{open_s:.1f} GPU-seconds are queued or running"))
    for reason, per_s, when in (
        (Reason.COMING, demand.per_s, "come"),
        (Reason.USUAL, demand.usual_per_s, "usually come at this time"),
    ):
        if demand.idle_s < config.keep_warm_s or reason is Reason.USUAL:
            why = f"{per_s:.2f} GPU-seconds a second {when}"
            found.append(Wanted(_ceil(per_s / per_replica), reason, why))
    found.append(_for_due(demand, per_replica, ready, coming_s, config))
    return max(found, key=lambda wanted: wanted.replicas)


def _for_due(
    demand: PoolDemand,
    per_replica: float,
    ready: int,
    coming_s: Sequence[float],
    config: PoolScaling,
) -> Wanted:
    """Those without which something is late: more only where those that would come then help."""
    most = Wanted(0, Reason.DUE, "nothing is due")
    there = [0.0] * ready + sorted(coming_s)
    for due_in_s, work_s in demand.due:
        if due_in_s <= 0:
            continue
        # of those that there are, the fewest that end it; if all do not, new ones besides
        lacking_s, replicas = work_s, 0
        for wait_s in there:
            if lacking_s <= 0:
                break
            lacking_s -= per_replica * max(0.0, due_in_s - wait_s)
            replicas += 1
        helps_s = due_in_s - config.cold_start_s
        if lacking_s > 0 and helps_s > 0:
            replicas += _ceil(lacking_s / (per_replica * max(helps_s, 1.0)))
        if replicas > most.replicas:
            why = f"{work_s:.1f} GPU-seconds are due in {due_in_s:.0f} s"
            most = Wanted(replicas, Reason.DUE, why)
    return most


def wanted_decoders(demand: PoolDemand, gpus: int, denoisers: int, config: PoolScaling) -> Wanted:
    """As many as keep up with so many denoisers, which hand over what they make."""
    if denoisers == 0:
        return Wanted(0, Reason.IDLE, "there is to be no denoiser")
    a_second = denoisers * gpus * demand.decode_share
    why = f"{denoisers} denoisers make {a_second:.2f} s of decoding a second"
    return Wanted(max(1, _ceil(a_second / config.load)), Reason.DENOISERS, why)


def _ceil(replicas: float) -> int:
    """Upwards, but for what rounding adds."""
    return math.ceil(replicas - 1e-9)
