"""One run of the simulated nodes, and what it shows; `bench.scheduling` makes the tables.

Every policy gets the same requests, step times and nodes of eight A100s. A request is due 2 s after
its arrival and so many times the time that its steps take at its best degree: 2.5, on the pro plan
1.5, on the free one 7.5. The first tenth of each run does not count.
"""

import functools
import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoscaling.simulated_cluster import ClusterConfig, Hang, History, Job, Reclaim, StepPolicy
from autoscaling.simulator import GuaranteedSet, Simulator
from autoscaling.step_scheduler import StepSchedulerConfig
from autoscaling.urgency import PlanUrgency, UrgencyConfig
from autoscaling.workloads import (
    HETU_KINDS,
    KINDS,
    MIX,
    PLANS,
    Asked,
    VideoKind,
    bursts,
    mean_work_s,
    poisson,
    requests,
    steady,
)
from bench.clairvoyant import clairvoyant_bound
from bench.published_planners import PLANNERS, PLANNERS_IN_TRIAL
from bench.published_schedulers import IN_TRIAL as SCHEDULERS_IN_TRIAL
from bench.published_schedulers import POLICIES as SCHEDULERS
from credits.plans import Plan

GPUS = 8
POLICIES: dict[str, Callable[[], StepPolicy]] = {**SCHEDULERS, **PLANNERS}
IN_TRIAL = {**SCHEDULERS_IN_TRIAL, **PLANNERS_IN_TRIAL}
"""Those without a row there are compared with as they are."""
FOUNDING_DOLLARS_PER_NODE_HOUR = 32.77
"""What the founding document has; `ClusterConfig` has the price of 2026."""
CARD_GB = 40.0
WARM_UP = 0.1
DOLLARS_PER_NODE_HOUR, PRICES = ClusterConfig().dollars_per_node_hour, ClusterConfig().prices
SPOT_NODES = 6
TRIAL_REQUESTS, TRIAL_SEEDS, TRIAL_POINTS = 400, range(40), 0.05
"""A published policy is compared with only if its row in the trial is met to TRIAL_POINTS."""
WEIGHTS = {Plan.FREE: 1.0, Plan.BASIC: 2.0, Plan.PRO: 4.0}
OURS = {
    "guaranteed-set": (0.0, StepSchedulerConfig()),
    "guaranteed-set-credits": (0.8, StepSchedulerConfig(late_capacity=0.3, long_step_s=0.0)),
    "guaranteed-set-all-ranks": (0.0, StepSchedulerConfig(long_step_s=0.0)),
    "guaranteed-set-whole-steps": (0.0, StepSchedulerConfig(section_s=math.inf)),
}
"""By how much a request's work counts for its value, and what the step scheduler is told."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests from a seed."""

    what: str
    arrivals: Callable[[random.Random, float], Iterator[float]]
    load: float = 0.7
    plans: Mapping[Plan, float] | None = None
    kinds: tuple[VideoKind, ...] = KINDS
    mix: tuple[float, ...] = MIX
    card_gb: float | None = None

    def requests(self, seed: int, count: int, nodes: int = 1) -> list[Asked]:
        """The first of them, for so many nodes."""
        rng = random.Random(seed)
        per_s = self.load * GPUS * nodes / mean_work_s(self.mix, self.kinds)
        arrivals = self.arrivals(rng, per_s)
        asked = requests(arrivals, rng, plans=self.plans, mix=lambda _: self.mix, kinds=self.kinds)
        return list(itertools.islice(asked, count))


WORKLOADS = {
    "W1": Workload("Poisson, one plan", poisson),
    "W2": Workload("bursts, one plan", bursts),
    "W5": Workload("Poisson, three plans", poisson, plans=PLANS),
    "W5-bursts": Workload("bursts, three plans", bursts, plans=PLANS),
    "W7": Workload(
        "HunyuanVideo in six steps at equal distances, as TridentServe's trace is described",
        steady,
        kinds=HETU_KINDS,
        mix=(1 / len(HETU_KINDS),) * len(HETU_KINDS),
    ),
    "W1-40GB": Workload("W1 on cards of 40 GB, which hold all models", poisson, card_gb=CARD_GB),
}


def cluster_for(
    work_exponent: float,
    nodes: int = 1,
    reclaims: tuple[Reclaim, ...] = (),
    hangs: tuple[Hang, ...] = (),
) -> ClusterConfig:
    """Nodes and the deadlines above."""
    scales = {Plan.FREE: 7.5, Plan.BASIC: 2.5, Plan.PRO: 1.5, Plan.ENTERPRISE: 1.5}
    urgency = UrgencyConfig(
        by_priority=tuple(
            PlanUrgency(scale=scale, value=WEIGHTS.get(plan, 8.0)) for plan, scale in scales.items()
        ),
        express_priority=len(scales),  # nobody overtakes but by deadline
        ageing_s=1e9,
        work_exponent=work_exponent,
    )
    return ClusterConfig(num_nodes=nodes, reclaims=reclaims, hangs=hangs, urgency=urgency)


def exponent_of(policy: str) -> float:
    """By which a request's work counts for its value."""
    return OURS[policy][0] if policy in OURS else 0.0


def make_policy(policy: str) -> StepPolicy:
    """Ours as configured, or a published one."""
    return GuaranteedSet(OURS[policy][1]) if policy in OURS else POLICIES[policy]()


def counted(history: History) -> list[Job]:
    """Without the warm-up."""
    return history.jobs[int(len(history.jobs) * WARM_UP) :]


def share_in_time(jobs: Iterable[Job], weight: Callable[[Job], float] = lambda job: 1.0) -> float:
    """Of the jobs, or of what they weigh; NaN if there are none."""
    kept = total = 0.0
    for job in jobs:
        total += weight(job)
        kept += weight(job) * job.in_time
    return kept / total if total else math.nan


def plan_weight(job: Job) -> float:
    """What it is worth to its plan."""
    return WEIGHTS[job.asked.plan]


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def fairness(jobs: Sequence[Job]) -> float:
    """Jain's index over the accounts of how many times longer than at best a request took, on
    average of the plans.
    """
    found = []
    for plan in {job.asked.plan for job in jobs}:
        slowed: dict[int, list[float]] = defaultdict(list)
        for job in jobs:
            if job.asked.plan is plan:
                least_s = job.asked.kind.num_steps * job.task.quickest_s
                slowed[job.asked.account].append(job.latency_s / least_s)
        found.append(jain([statistics.mean(values) for values in slowed.values()]))
    return statistics.mean(found)


def bound_of(history: History) -> dict[str, float]:
    """What share of the deadlines, by count and by plan, could be kept at all on one node."""
    first = int(len(history.jobs) * WARM_UP)
    counts = {job.task.id for job in history.jobs[first:]}
    found = {}
    for name, weight in (("count", lambda job: 1.0), ("plan", plan_weight)):

        def counted_weight(job: Job, weight: Callable[[Job], float] = weight) -> float:
            return weight(job) if job.task.id in counts else 0.0

        most = sum(counted_weight(job) for job in history.jobs)
        found[name] = clairvoyant_bound(history.jobs, GPUS, counted_weight) / most
    return found


def figures(history: History) -> dict[str, Any]:
    """What the table and the JSON show of one run."""
    jobs = counted(history)
    ended = [job for job in jobs if job.finished_s is not None]
    latencies = sorted(job.latency_s for job in ended)
    hours = history.node_s / 3600  # to the end of the last video
    videos = sum(job.finished_s is not None for job in history.jobs)
    charged = sum(job.charged(PRICES) for job in history.jobs)
    return {
        "attainment": share_in_time(jobs),
        "weighted": share_in_time(jobs, plan_weight),
        "by_work": share_in_time(jobs, lambda job: job.asked.kind.work_s),
        "by_plan": _by(jobs, lambda job: str(job.asked.plan)),
        "by_class": _by(jobs, lambda job: job.asked.kind.name),
        "p50_s": latencies[len(latencies) // 2],
        "p95_s": latencies[int(len(latencies) * 0.95)],
        "p99_s": latencies[int(len(latencies) * 0.99)],
        "gpu_hours": hours * GPUS,
        "dollars_per_video": hours * DOLLARS_PER_NODE_HOUR / videos,
        "credits_per_dollar": charged / (hours * DOLLARS_PER_NODE_HOUR),
        "busy_over_work": history.busy_s / sum(job.asked.kind.work_s for job in history.jobs),
        "wasted_share": history.waste_s / (history.node_s * GPUS),
        "fairness": fairness(ended),
        "moves_per_video": statistics.mean(job.num_moves for job in jobs),
    }


def _by(jobs: Iterable[Job], group: Callable[[Job], str]) -> dict[str, float]:
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[group(job)].append(job)
    return {name: share_in_time(members) for name, members in sorted(groups.items())}


def run_once(workload: str, policy: str, seed: int, count: int) -> History:
    """The requests of a workload on one node."""
    cluster = replace(cluster_for(exponent_of(policy)), card_gb=WORKLOADS[workload].card_gb)
    asked = WORKLOADS[workload].requests(seed, count)
    return Simulator(cluster, functools.partial(make_policy, policy), seed=seed).run(asked)


def simulate(workload: str, policy: str, seed: int, count: int) -> dict[str, Any]:
    """What one run shows."""
    return figures(run_once(workload, policy, seed, count))


def bounds(workload: str, seed: int, count: int) -> dict[str, float]:
    """What could be kept of one run's deadlines, which are every policy's."""
    return bound_of(run_once(workload, "srtf-step", seed, count))


def disturbed(
    policy: str, seed: int, count: int, notice_s: float, hang_every_s: float = math.inf
) -> dict[str, Any]:
    """W6: W5 while half of the nodes go, one every ten minutes; the other half has room for all
    requests, though steps hang there in turn. Also the videos that never ended, and the most steps
    that one had to make again.
    """
    reclaims = tuple(Reclaim(node, 600.0 * (node + 1), notice_s) for node in range(SPOT_NODES))
    asked = WORKLOADS["W5"].requests(seed, count, SPOT_NODES)
    num_hangs = int(asked[-1].arrived_s / hang_every_s)
    hangs = tuple(
        Hang(SPOT_NODES + number % SPOT_NODES, (number + 1) * hang_every_s)
        for number in range(num_hangs)
    )
    cluster = cluster_for(exponent_of(policy), 2 * SPOT_NODES, reclaims, hangs)
    history = Simulator(cluster, functools.partial(make_policy, policy), seed=seed).run(asked)
    return {
        **figures(history),
        "lost_videos": sum(job.finished_s is None for job in history.jobs),
        "steps_lost_max": max(job.lost_steps for job in history.jobs),
    }


def reproduced(policy: str, seed: int) -> float:
    """What the trial's row says of a policy, from one seed of ours."""
    asked = WORKLOADS["W1"].requests(seed, TRIAL_REQUESTS)
    return share_in_time(counted(Simulator(cluster_for(0.0), POLICIES[policy]).run(asked)))


def decision_p99_ms(num_jobs: int, seed: int = 0) -> float:
    """Of the step scheduler alone, with about so many requests at one node and a GPU idle."""
    rng = random.Random(seed)
    asked = WORKLOADS["W5-bursts"].requests(seed, num_jobs)
    all_at_once = [one._replace(arrived_s=rng.uniform(0, 60)) for one in asked]
    all_at_once.sort(key=lambda one: one.arrived_s)
    took = []
    simulator = Simulator(cluster_for(0.0), GuaranteedSet, time_decisions=True)
    for waiting, seconds in simulator.run(all_at_once).decisions:
        if waiting >= 0.8 * num_jobs:
            took.append(seconds)
    return 1e3 * sorted(took)[int(0.99 * len(took))]
