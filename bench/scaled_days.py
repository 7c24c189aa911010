"""Days of a cluster whose nodes come and go: how many node-hours each scaling policy takes.

A request is due 60 s after its arrival and five times the time of its steps at their best degree;
a node of eight A100s takes 360 s to come, holds 16 requests, and is paid for from the moment that
it is asked for. All policies run the live step scheduler inside of their nodes.
"""

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoscaling.pool_scaling import PoolScaling
from autoscaling.simulated_cluster import ClusterConfig, History, NodePolicy, NodeStart
from autoscaling.simulated_scaling import ByDemandScaling, ServeDelays
from autoscaling.simulator import GuaranteedSet, Simulator
from autoscaling.urgency import PlanUrgency, UrgencyConfig
from autoscaling.workloads import (
    DAY_S,
    MIX,
    Asked,
    mean_work_s,
    mix_of_day,
    requests,
    varying,
    work_of_day,
)
from bench.published_scalers import DisagFusion, Keda, RayServe, Static

GPUS = 8
SLOTS = 16
MEAN_NODES = 4.0
PEAK_NODES = 8
URGENCY = UrgencyConfig(
    base_s=60.0,
    by_priority=(PlanUrgency(scale=5.0, value=1.0),),
    express_priority=9,
    ageing_s=1e9,
    work_exponent=0.0,
)
POOL = PoolScaling(load=0.92, cold_start_s=NodeStart().total_s, keep_warm_s=600.0, usual_days=0)
DOWN_S = 60.0
SCALERS: dict[str, Callable[[], NodePolicy]] = {
    "by-demand": lambda: ByDemandScaling(URGENCY, POOL, delays=ServeDelays(0.0, DOWN_S)),
    "ray-default-2": lambda: RayServe(2.0),
    "ray-4": lambda: RayServe(4.0),
    "ray-6": lambda: RayServe(6.0),
    "keda-4": lambda: Keda(4.0),
    "disagfusion": DisagFusion,
    f"static-{PEAK_NODES}": lambda: Static(PEAK_NODES),
}


@dataclass(frozen=True, slots=True)
class Day:
    """What comes in a day. shifts: short and long videos in turn; flash: so many times as much for
    20 minutes at its middle.
    """

    what: str
    shifts: bool = False
    flash: float = 1.0

    def requests(self, seed: int, hours: float = 24.0) -> list[Asked]:
        """The same for every policy."""
        rng = random.Random(seed)
        mix = mix_of_day if self.shifts else (lambda _: MIX)

        def per_s(moment_s: float) -> float:
            in_flash = DAY_S / 2 <= moment_s < DAY_S / 2 + 1200
            work = work_of_day(moment_s, MEAN_NODES * GPUS) * (self.flash if in_flash else 1.0)
            return work / mean_work_s(mix(moment_s))

        moments = range(0, int(hours * 3600), 60)
        most = 1.05 * max(per_s(float(moment_s)) for moment_s in moments)
        coming = requests(varying(rng, per_s, most), rng, mix=mix)
        return list(itertools.takewhile(lambda one: one.arrived_s < hours * 3600, coming))


DAYS = {
    "W3": Day("a day, sinus, one mix"),
    "W3-shift": Day("a day, sinus, short and long videos in turn", shifts=True),
    "W4": Day("a day, five times as much for 20 minutes", flash=5.0),
}


def simulate_day(
    day: str, scaler: str, seed: int, hours: float = 24.0, scalers: Mapping[str, Any] = SCALERS
) -> dict[str, float]:
    """One run. over_bound: node-hours over those that the work takes, on one GPU each."""
    asked = DAYS[day].requests(seed, hours)
    config = ClusterConfig(num_nodes=3, slots=SLOTS, urgency=URGENCY)
    simulator = Simulator(config, GuaranteedSet, seed=seed, scaling=scalers[scaler]())
    return figures_of_day(simulator.run(asked))


def figures_of_day(history: History) -> dict[str, float]:
    """What the table shows of one run."""
    jobs = history.jobs
    bound_h = sum(job.asked.kind.work_s for job in jobs) / GPUS / 3600
    return {
        "attainment": sum(job.in_time for job in jobs) / len(jobs),
        "node_hours": history.node_s / 3600,
        "bound_hours": bound_h,
        "over_bound": history.node_s / 3600 / bound_h,
        "videos": float(len(jobs)),
    }
