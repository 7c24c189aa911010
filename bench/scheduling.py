"""How well step schedulers keep deadlines, and how many node-hours scaling policies take: ours, and
those that others published, simulated.

`bench.node_runs` says what a run is, `bench.scaled_days` what a day is. The simulator runs the live
step scheduler and the live scaling rules; published ones are in `bench.published_schedulers`,
`published_planners` and `published_scalers`. Of the bound: a share of what a linear programme says
that nobody can exceed (`bench.clairvoyant`).
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from autoscaling.simulator import GuaranteedSet, Simulator
from bench.machine import describe_machine
from bench.node_runs import (
    DOLLARS_PER_NODE_HOUR,
    FOUNDING_DOLLARS_PER_NODE_HOUR,
    GPUS,
    IN_TRIAL,
    OURS,
    POLICIES,
    TRIAL_POINTS,
    TRIAL_REQUESTS,
    TRIAL_SEEDS,
    WORKLOADS,
    bounds,
    cluster_for,
    decision_p99_ms,
    disturbed,
    reproduced,
    simulate,
)
from bench.scaled_days import DAYS, SCALERS, simulate_day
from bench.scheduling_plots import plot_days, plot_nodes

SCALE_NODES = 125
HANG_EVERY_S = 7200.0
SCALE_REQUESTS = 10_000
PARTS = ("nodes", "spot", "decision", "days", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling", description=__doc__)
    parser.add_argument("--seeds", type=seeds_of, default=range(1000, 1005), help="A..B")
    parser.add_argument("--requests", type=int, default=2000, help="of each run")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    policies = [*OURS, *POLICIES]
    parser.add_argument("--policies", nargs="+", choices=policies, default=policies)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--days", nargs="+", choices=DAYS, default=list(DAYS))
    parser.add_argument("--scalers", nargs="+", choices=SCALERS, default=list(SCALERS))
    parser.add_argument("--scale-to", type=int, default=1, help="times 100,000 requests")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plots", help="a folder for PNGs")
    arguments = parser.parse_args()
    print(describe_machine())
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        if "nodes" in arguments.parts:
            _nodes(pool, arguments, result)
        if "spot" in arguments.parts:
            result |= _spot(pool, arguments)
        if "decision" in arguments.parts:
            p99_ms = result["decision_p99_ms"] = decision_p99_ms(500)
            print(f"\na decision with 500 requests at the node: p99 {p99_ms:.2f} ms")
        if "days" in arguments.parts:
            result |= _days(pool, arguments)
    if "scale" in arguments.parts:
        result["scale"] = _scale(arguments.scale_to)
    if arguments.plots:
        plot_nodes(result, arguments.plots)
        plot_days(result, arguments.plots)
    print(json.dumps(_rounded(result)))


def seeds_of(text: str) -> range:
    """`A..B`, both included; argparse's ValueError otherwise."""
    first, last = (int(part) for part in text.split(".."))
    return range(first, last + 1)


def _nodes(
    pool: ProcessPoolExecutor, arguments: argparse.Namespace, result: dict[str, Any]
) -> None:
    print(
        f"one node of {GPUS} A100s, load 0.7, {arguments.requests} requests, "
        f"seeds {arguments.seeds[0]} to {arguments.seeds[-1]}"
    )
    compared = _reproduce(pool, arguments.policies, result)
    for workload in arguments.workloads:
        print(f"\n{workload}: {WORKLOADS[workload].what}")
        result[workload] = _workload(pool, workload, compared, arguments)


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
        here = statistics.mean(pool.map(functools.partial(reproduced, policy), TRIAL_SEEDS))
        trial = IN_TRIAL.get(policy)
        near = trial is None or abs(here - trial) <= TRIAL_POINTS
        row = " none" if trial is None else f"{trial:.3f}"
        print(f"  {policy:24} {row} {here:.3f}{'' if near else ': not compared with'}")
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
    seeds, count = arguments.seeds, arguments.requests
    found = _over(pool, functools.partial(bounds, workload, count=count), seeds)
    most = {name: statistics.mean(run[name] for run in found) for name in found[0]}
    print(f"  nobody could keep more than {most['count']:.3f}, by plan {most['plan']:.3f}")
    print(
        f"  {'policy':24}{'in time':>15} {'of bound':>8} {'by plan':>8} {'by work':>8} {'p50':>6}"
        f" {'p95':>6} {'p99':>6} {'GPU-s/work':>10} {'wasted':>7} {'fair':>5} {'GPU-h':>6} {'$':>6}"
        f" {'cr/$':>5}"
    )
    rows = {}
    for policy in policies:
        runs = _over(pool, functools.partial(simulate, workload, policy, count=count), seeds)
        row = rows[policy] = _mean(runs)
        spread = statistics.stdev(r["attainment"] for r in runs) if len(runs) > 1 else 0.0
        row["attainment_spread"] = spread
        several = WORKLOADS[workload].plans is not None
        share = row["weighted"] / most["plan"] if several else row["attainment"] / most["count"]
        row["bound_share"] = share
        print(
            f"  {policy:24} {row['attainment']:.3f} +- {spread:.3f} {share:8.3f}"
            f" {row['weighted']:8.3f} {row['by_work']:8.3f} {row['p50_s']:6.0f} {row['p95_s']:6.0f}"
            f" {row['p99_s']:6.0f} {row['busy_over_work']:10.3f} {row['wasted_share']:7.1%}"
            f" {row['fairness']:5.2f} {row['gpu_hours']:6.0f} {row['dollars_per_video']:6.3f}"
            f" {row['credits_per_dollar']:5.0f}"
        )
        sys.stdout.flush()
    for policy in (policy for policy in policies if policy in OURS):
        print(f"  {policy}, by class: {_shares(rows[policy]['by_class'])}")
        if len(rows[policy]["by_plan"]) > 1:
            print(f"  {policy}, by plan: {_shares(rows[policy]['by_plan'])}")
    then = FOUNDING_DOLLARS_PER_NODE_HOUR
    print(
        f"  $: for a video, at the price of 2026 of a node-hour, {DOLLARS_PER_NODE_HOUR} (at the"
        f" founding document's, {then}, {then / DOLLARS_PER_NODE_HOUR:.3f} times as much);"
        " cr/$: credits that are charged, by the live price table"
    )
    return rows


def _spot(pool: ProcessPoolExecutor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what reclaimed nodes cost."""
    print(
        "\nW6: W5 on twelve nodes, of which six are reclaimed, one every ten minutes; on the others"
        f" a step hangs every {HANG_EVERY_S / 3600:g} hours, where it is told"
    )
    spot: dict[str, Any] = {"lost_videos": 0}
    rows = {}
    for policy in (policy for policy in arguments.policies if policy in (*OURS, "srtf-step")):
        for notice_s, hang_every_s, key in (
            (120.0, math.inf, "steps_lost_max"),
            (0.0, math.inf, "steps_lost_max_without_notice"),
            (120.0, HANG_EVERY_S, "steps_lost_max_with_hangs"),
        ):
            act = functools.partial(
                disturbed,
                policy,
                count=arguments.requests,
                notice_s=notice_s,
                hang_every_s=hang_every_s,
            )
            runs = _over(pool, act, arguments.seeds)
            lost = sum(run["lost_videos"] for run in runs)
            steps = max(run["steps_lost_max"] for run in runs)
            row = _mean(runs)
            and_hangs = "" if math.isinf(hang_every_s) else ", hangs"
            print(
                f"  {policy:24} {notice_s:5g} s of notice{and_hangs}:"
                f" in time {row['attainment']:.3f}, by plan {row['weighted']:.3f};"
                f" {lost} videos lost, at most {steps} steps of one made again"
            )
            if policy == "guaranteed-set":
                spot["lost_videos"] += lost
                spot[key] = steps
            if key == "steps_lost_max":
                rows[policy] = row
    return {"W6": rows, "spot": spot}


def _days(pool: ProcessPoolExecutor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what each scaling policy takes of each day."""
    rows: dict[str, Any] = {}
    for day in arguments.days:
        print(f"\n{day}: {DAYS[day].what}")
        print(f"  {'policy':16} {'in time':>8} {'node-h':>7} {'/work':>6} {'$/video':>8}")
        rows[day] = {}
        for scaler in arguments.scalers:
            runs = _over(pool, functools.partial(simulate_day, day, scaler), arguments.seeds)
            row = rows[day][scaler] = _mean(runs)
            dollars = row["node_hours"] * DOLLARS_PER_NODE_HOUR / row["videos"]
            row["dollars_per_video"] = dollars
            print(
                f"  {scaler:16} {row['attainment']:8.4f} {row['node_hours']:7.1f}"
                f" {row['over_bound']:6.3f} {dollars:8.4f}"
            )
            sys.stdout.flush()
    shift = rows.get("W3-shift", {})
    found: dict[str, Any] = {"days": rows}
    if {"by-demand", "ray-default-2"} <= shift.keys():
        ours = shift["by-demand"]
        found["scaling"] = {
            "attainment": ours["attainment"],
            "over_bound": ours["over_bound"],
            "over_ray_default": ours["node_hours"] / shift["ray-default-2"]["node_hours"],
        }
        print(f"  by-demand takes {found['scaling']['over_ray_default']:.3f} of Ray's default")
    return found


def _scale(times: int) -> dict[str, Any]:
    """Print how long runs of many requests take on one core."""
    print("\nrequests on GPUs of W1, simulated on one core:")
    found: dict[str, Any] = {}
    sizes = [(SCALE_REQUESTS, SCALE_NODES), (10 * SCALE_REQUESTS, SCALE_NODES)]
    if times > 1:
        sizes.append((10 * SCALE_REQUESTS * times, SCALE_NODES * times))
    for count, nodes in sizes:
        asked = WORKLOADS["W1"].requests(0, count, nodes)
        began_s = time.process_time()
        history = Simulator(cluster_for(0.0, nodes), GuaranteedSet).run(asked)
        took_s = time.process_time() - began_s
        in_time = sum(job.in_time for job in history.jobs) / count
        print(f"  {count:9,} on {nodes * GPUS:6,}: {took_s:7.1f} s, {in_time:.4f} in time")
        sys.stdout.flush()
        found[f"{count}_on_{nodes * GPUS}_s"] = took_s
    first, second = list(found.values())[:2]
    found["ratio_for_10x"] = second / first
    print(f"  ten times as many take {second / first:.1f} times as long")
    return found


def _over(
    pool: ProcessPoolExecutor, act: Callable[..., dict[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One run of each seed."""
    return [future.result() for future in [pool.submit(act, seed=seed) for seed in seeds]]


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


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())


if __name__ == "__main__":
    main()
