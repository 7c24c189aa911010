"""How well step schedulers keep deadlines: ours, and those that others published, simulated.

Every policy gets the same requests, step times and node of eight A100s. A request is due 2 s after
its arrival and so many times the time that its steps take at its best degree: 2.5, on the pro plan
1.5, on the free one 7.5. The first tenth of each run does not count. The simulator runs the live
step scheduler; published ones are in `bench.published_schedulers`.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from autoscaling.simulated_cluster import ClusterConfig, History, Job, Reclaim, StepPolicy
from autoscaling.simulator import GuaranteedSet, Simulator
from autoscaling.urgency import PlanUrgency, UrgencyConfig
from autoscaling.workloads import PLANS, Asked, bursts, mean_work_s, poisson, requests
from bench.machine import describe_machine
from bench.published_schedulers import IN_TRIAL, POLICIES
from credits.plans import Plan

GPUS = 8
DOLLARS_PER_NODE_HOUR = 21.96  # p4d.24xlarge on demand, 2026; 32.77 before June 2025
WARM_UP = 0.1
SPOT_NODES = 6
TRIAL_REQUESTS, TRIAL_SEEDS, TRIAL_POINTS = 400, range(40), 0.05
"""A published policy is compared with only if its row in the trial is met to TRIAL_POINTS."""
WEIGHTS = {Plan.FREE: 1.0, Plan.BASIC: 2.0, Plan.PRO: 4.0}
OURS = {"guaranteed-set": 0.0, "guaranteed-set-credits": 0.8}
"""By how much a request's work counts for its value."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests from a seed."""

    what: str
    arrivals: Callable[[random.Random, float], Iterator[float]]
    load: float = 0.7
    plans: Mapping[Plan, float] | None = None

    def requests(self, seed: int, count: int, nodes: int = 1) -> list[Asked]:
        """The first of them, for so many nodes."""
        rng = random.Random(seed)
        per_s = self.load * GPUS * nodes / mean_work_s()
        asked = requests(self.arrivals(rng, per_s), rng, plans=self.plans)
        return list(itertools.islice(asked, count))


WORKLOADS = {
    "W1": Workload("Poisson, one plan", poisson),
    "W2": Workload("bursts, one plan", bursts),
    "W5": Workload("Poisson, three plans", poisson, plans=PLANS),
    "W5-bursts": Workload("bursts, three plans", bursts, plans=PLANS),
}


def cluster_for(
    work_exponent: float, nodes: int = 1, reclaims: tuple[Reclaim, ...] = ()
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
    return ClusterConfig(num_nodes=nodes, reclaims=reclaims, urgency=urgency)


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


def attainment(history: History) -> float:
    """Of the deadlines, weighted by plan."""
    return share_in_time(counted(history), plan_weight)


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


def figures(history: History) -> dict[str, Any]:
    """What the table and the JSON show of one run."""
    jobs = counted(history)
    latencies = sorted(job.latency_s for job in jobs)
    hours = history.end_s / 3600  # the node's, to the end of the last video
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
        "dollars_per_video": hours * DOLLARS_PER_NODE_HOUR / len(history.jobs),
        "busy_over_work": history.busy_s / sum(job.asked.kind.work_s for job in history.jobs),
        "wasted_share": history.waste_s / (hours * 3600 * GPUS),
        "fairness": fairness(jobs),
        "moves_per_video": statistics.mean(job.num_moves for job in jobs),
    }


def _by(jobs: Iterable[Job], group: Callable[[Job], str]) -> dict[str, float]:
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[group(job)].append(job)
    return {name: share_in_time(members) for name, members in sorted(groups.items())}


def simulate(workload: str, policy: str, seed: int, count: int) -> dict[str, Any]:
    """One run."""
    make: Callable[[], StepPolicy] = POLICIES.get(policy, GuaranteedSet)
    cluster = cluster_for(OURS.get(policy, 0.0))
    asked = WORKLOADS[workload].requests(seed, count)
    return figures(Simulator(cluster, make, seed=seed).run(asked))


def reclaimed(seed: int, count: int, notice_s: float) -> tuple[int, int]:
    """Videos that never ended, and the most steps that one of them had to make again, while half of
    the nodes go away, one every ten minutes; the other half has room for all requests.
    """
    reclaims = tuple(Reclaim(node, 600.0 * (node + 1), notice_s) for node in range(SPOT_NODES))
    cluster = cluster_for(0.0, 2 * SPOT_NODES, reclaims)
    asked = WORKLOADS["W5"].requests(seed, count, SPOT_NODES)
    history = Simulator(cluster, GuaranteedSet, seed=seed).run(asked)
    lost = sum(job.finished_s is None for job in history.jobs)
    return lost, max(job.lost_steps for job in history.jobs)


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


def _mean(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the seeds, key by key; a class that no run had is left out."""
    merged: dict[str, Any] = {}
    for key, value in runs[0].items():
        if isinstance(value, dict):
            names = sorted({name for run in runs for name in run[key]})
            merged[key] = {
                name: statistics.mean(run[key][name] for run in runs if name in run[key])
                for name in names
            }
        else:
            merged[key] = statistics.mean(run[key] for run in runs)
    return merged


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def seeds_of(text: str) -> range:
    """`A..B`, both included; argparse's ValueError otherwise."""
    first, last = (int(part) for part in text.split(".."))
    return range(first, last + 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling", description=__doc__)
    parser.add_argument("--seeds", type=seeds_of, default=range(1000, 1005), help="A..B")
    parser.add_argument("--requests", type=int, default=2000, help="of each run")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    policies = [*OURS, *POLICIES]
    parser.add_argument("--policies", nargs="+", choices=policies, default=policies)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(describe_machine())
    print(
        f"one node of {GPUS} A100s, load 0.7, {arguments.requests} requests, "
        f"seeds {arguments.seeds[0]} to {arguments.seeds[-1]}"
    )
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        compared = _reproduce(pool, arguments.policies, result)
        for workload in arguments.workloads:
            print(f"\n{workload}: {WORKLOADS[workload].what}")
            result[workload] = _workload(pool, workload, compared, arguments)
    result["spot"] = _spot(arguments.seeds, arguments.requests)
    result["decision_p99_ms"] = decision_p99_ms(500)
    print(f"\na decision with 500 requests at the node: p99 {result['decision_p99_ms']:.2f} ms")
    print(json.dumps(_rounded(result)))


def _reproduce(
    pool: ProcessPoolExecutor, policies: Sequence[str], result: dict[str, Any]
) -> list[str]:
    """Print how near each published policy is to its row; those that may be compared with."""
    compared = []
    print(
        f"\nin time of W1 in the trial, and here ({len(TRIAL_SEEDS)} x {TRIAL_REQUESTS} requests):"
    )
    for policy in policies:
        if policy not in POLICIES:
            compared.append(policy)
            continue
        shares = list(pool.map(functools.partial(reproduced, policy), TRIAL_SEEDS))
        here, trial = statistics.mean(shares), IN_TRIAL[policy]
        near = abs(here - trial) <= TRIAL_POINTS
        print(f"  {policy:24} {trial:.3f} {here:.3f}{'' if near else ': not compared with'}")
        result.setdefault("reproduced", {})[policy] = {"trial": trial, "here": here}
        if near:
            compared.append(policy)
    return compared


def _workload(
    pool: ProcessPoolExecutor,
    workload: str,
    policies: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Print a line for each policy."""
    print(
        f"  {'policy':24}{'in time':>15} {'by plan':>8} {'by work':>8} {'p50':>7} {'p95':>7}"
        f" {'p99':>7} {'GPU-s/work':>10} {'wasted':>7} {'fair':>5} {'$/video':>8}"
    )
    rows = {}
    for policy in policies:
        run = functools.partial(simulate, workload, policy, count=arguments.requests)
        runs = [future.result() for future in [pool.submit(run, s) for s in arguments.seeds]]
        row = rows[policy] = _mean(runs)
        spread = statistics.stdev(r["attainment"] for r in runs) if len(runs) > 1 else 0.0
        row["attainment_spread"] = spread
        print(
            f"  {policy:24} {row['attainment']:.3f} +- {spread:.3f} {row['weighted']:8.3f}"
            f" {row['by_work']:8.3f} {row['p50_s']:7.0f} {row['p95_s']:7.0f} {row['p99_s']:7.0f}"
            f" {row['busy_over_work']:10.3f} {row['wasted_share']:7.1%} {row['fairness']:5.2f}"
            f" {row['dollars_per_video']:8.3f}"
        )
        sys.stdout.flush()
    for policy in (policy for policy in policies if policy in OURS):
        print(f"  {policy}, by class: {_shares(rows[policy]['by_class'])}")
        if len(rows[policy]["by_plan"]) > 1:
            print(f"  {policy}, by plan: {_shares(rows[policy]['by_plan'])}")
    return rows


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())


def _spot(seeds: Sequence[int], count: int) -> dict[str, Any]:
    """Print what reclaimed nodes cost."""
    found: dict[str, Any] = {}
    for notice_s, key in ((120.0, "steps_lost_max"), (0.0, "steps_lost_max_without_notice")):
        runs = [reclaimed(seed, count, notice_s) for seed in seeds]
        found["lost_videos"] = found.get("lost_videos", 0) + sum(lost for lost, _ in runs)
        found[key] = max(steps for _, steps in runs)
        print(
            f"\nnodes reclaimed with {notice_s:g} s of notice: {found['lost_videos']} videos lost, "
            f"at most {found[key]} steps of a video made again"
        )
    return found


if __name__ == "__main__":
    main()
