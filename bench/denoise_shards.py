"""One rank against two of one thread each: the same step of each family, on gloo.

The one-rank time is taken while an identical one-rank process runs beside it, so that both sides
share the memory's bandwidth alike; the bare one is printed too. Each round times both, and the
efficiency is the rounds' median, with the least and the most beside it. The prediction is
`predict_step`'s for this machine: half of what one rank took, and the calls and bytes at the
latency and speed that all-to-alls reach here.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.machine import describe_machine
from bench.ranks import run_ranks
from bench.shard_steps import STEPS, TRANSFORMERS, Step
from parallel.mesh import Mesh, MeshBuilder
from parallel.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one rank's steps, round by round, and what was sent and predicted."""

    alone_s: list[float]
    beside_s: list[float]
    shared_s: list[float]
    talking_s: list[float]
    bytes_sent: int
    formula_bytes: float
    predicted: float
    difference: float
    guided_difference: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.denoise_shards", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{'':15}{'alone s':>9}{'beside s':>9}{'2 ranks s':>10}{'talking':>9}", end="")
    print(f"{'MB sent':>9}{'formula':>9}{'predicted':>10}{'efficiency':>11}")
    efficiency, predicted, ratios = {}, {}, []
    plain, guided = 0.0, 0.0
    for name in STEPS:
        timings: list[Timing] = run_ranks(2, time_family, name, arguments.rounds)
        first = timings[0]
        beside_s = [statistics.mean(s) for s in zip(*(t.beside_s for t in timings), strict=True)]
        shared_s = [max(seconds) for seconds in zip(*(t.shared_s for t in timings), strict=True)]
        rounds = sorted(b / s / 2 for b, s in zip(beside_s, shared_s, strict=True))
        efficiency[name] = round(statistics.median(rounds), 3)
        predicted[name] = round(min(timing.predicted for timing in timings), 3)
        ratios += [timing.bytes_sent / timing.formula_bytes for timing in timings]
        plain = max(plain, *(timing.difference for timing in timings))
        guided = max(guided, *(timing.guided_difference for timing in timings))
        print(
            f"{name:15}{statistics.median(first.alone_s):9.2f}{statistics.median(beside_s):9.2f}"
            f"{statistics.median(shared_s):10.2f}{sum(first.talking_s) / sum(shared_s):9.1%}"
            f"{first.bytes_sent / 1e6:9.2f}{first.formula_bytes / 1e6:9.2f}{predicted[name]:10.1%}"
            f"{efficiency[name]:11.1%} ({rounds[0]:.0%}..{rounds[-1]:.0%})",
            flush=True,
        )
    result = {
        "efficiency": efficiency,
        "predicted": predicted,
        "bytes_ratio_max": round(max(ratios), 4),
        "max_abs_diff": {"plain": plain, "guided": guided},
    }
    print(json.dumps(result))


def time_family(rank: int, name: str, rounds: int) -> Timing:
    """On both ranks at once."""
    torch.set_num_threads(1)
    builder = MeshBuilder(rank, 2)
    plan = ParallelPlan(ulysses=2) if name in TRANSFORMERS else ParallelPlan(frames=2)
    both, single = builder.mesh(plan, (0, 1)), builder.mesh(ParallelPlan(), (rank,))
    step = STEPS[name](both)
    latency_s, bytes_per_s = _measure_exchange(both)
    difference, guided_difference = _differences(step, single, both)
    seconds = _clock_collectives(both)
    builder.traffic.bytes_sent.clear()
    builder.traffic.calls.clear()
    beside, together, talking = [], [], []
    step.use(single)
    for turn in (0, 1):
        dist.barrier()
        if turn == rank:
            alone = [_timed(step.call) for _ in range(3)]
    for _ in range(rounds):
        step.use(single)
        dist.barrier()
        beside.append(_timed(step.call))
        step.use(both)
        seconds.clear()
        dist.barrier()
        together.append(_timed(step.call))
        talking.append(sum(seconds))
    sent = builder.traffic.bytes_sent.total() // rounds
    exchange_s = builder.traffic.calls.total() / rounds * latency_s + sent / bytes_per_s
    beside_s = statistics.median(beside)
    return Timing(
        alone_s=alone,
        beside_s=beside,
        shared_s=together,
        talking_s=talking,
        bytes_sent=sent,
        formula_bytes=step.formula_bytes,
        predicted=beside_s / (beside_s + 2 * exchange_s),
        difference=difference,
        guided_difference=guided_difference,
    )


def _timed(act: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s


def _measure_exchange(mesh: Mesh) -> tuple[float, float]:
    """Seconds of a small all-to-all, and bytes a second of a large one."""

    def exchange_s(num_values: int) -> float:
        half = torch.zeros(num_values)
        shapes = [(num_values,)] * 2
        return statistics.median(
            _timed(lambda: mesh.part.all_to_all([half, half], shapes)) for _ in range(9)
        )

    latency_s, large = exchange_s(16), 1 << 20
    return latency_s, 4 * large / (exchange_s(large) - latency_s)


def _differences(step: Step, single: Mesh, both: Mesh) -> tuple[float, float]:
    """Of the shared step from the whole one, without guidance and with it."""
    step.use(single)
    whole, guided = step.call(), step.guided()
    step.use(both)
    return _largest(step.call(), step.part(whole)), _largest(step.guided(), step.part(guided))


def _largest(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())


def _clock_collectives(mesh: Mesh) -> list[float]:
    """Seconds of each collective of the mesh from now on, waiting for the other rank included."""
    seconds: list[float] = []

    def clocked(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started_s = time.perf_counter()
            result = act(*args)
            seconds.append(time.perf_counter() - started_s)
            return result

        return call

    for name in ("all_to_all", "all_gather", "exchange_edges"):
        vars(mesh.part)[name] = clocked(getattr(mesh.part, name))
    return seconds


if __name__ == "__main__":
    main()
