"""`python -m bench.replay_trace FILE`: a recorded trace on simulated nodes, by several policies."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from autoscaling.simulator import Simulator
from autoscaling.traces import read_trace
from bench.node_runs import OURS, POLICIES, cluster_for, exponent_of, figures, make_policy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replay_trace", description=__doc__)
    parser.add_argument("trace", type=Path, help="JSON lines, as bench.export_trace writes them")
    parser.add_argument("--nodes", type=int, default=1)
    choices = [*OURS, *POLICIES]
    parser.add_argument(
        "--policies", nargs="+", choices=choices, default=["guaranteed-set", "srtf-step"]
    )
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for policy in arguments.policies:
        cluster = cluster_for(exponent_of(policy), arguments.nodes)
        make = functools.partial(make_policy, policy)
        with arguments.trace.open() as lines:
            found = figures(Simulator(cluster, make).run(read_trace(lines)))
        result[policy] = found
        print(
            f"{policy:24} in time {found['attainment']:.3f}, by plan {found['weighted']:.3f}, "
            f"p50 {found['p50_s']:.0f} s, p99 {found['p99_s']:.0f} s"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
