"""What `choose_plan` chooses for the four families on 1 to 16 A100s, and what it predicts.

Predictions, not measurements: no GPU is touched. Beside them stand the figures that others
published and the times that the founding document (7.1) names for 16 frames of each family.
"""

import argparse
import json
from dataclasses import dataclass

from bench.machine import describe_machine
from models.cost import denoise_shape
from models.request import ModelFamily
from parallel.plan import P4D, ParallelPlan, choose_plan, predict_step

GPUS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Work:
    """A request; wanted_s: the founding document's time for 16 frames of the family."""

    name: str
    family: ModelFamily
    num_frames: int
    width: int
    height: int
    num_steps: int
    wanted_s: tuple[float, float]
    guided: bool = True
    f_patch_size: int = 1


WORK = (
    Work("AnimateDiff 16f 512x512", ModelFamily.ANIMATEDIFF, 16, 512, 512, 25, (30, 60)),
    Work("SVD 14f 1024x576", ModelFamily.SVD, 14, 1024, 576, 25, (60, 120)),
    Work("SVD-XT 25f 1024x576", ModelFamily.SVD_XT, 25, 1024, 576, 25, (60, 120)),
    Work("Z-Image 45f 1280x720", ModelFamily.Z_IMAGE_VIDEO, 45, 1280, 720, 30, (60, 180)),
    Work(
        "Z-Image 45f 1280x720, f_patch 4",
        ModelFamily.Z_IMAGE_VIDEO,
        45,
        1280,
        720,
        30,
        (60, 180),
        f_patch_size=4,
    ),
    Work(
        "HunyuanVideo 61f 960x544", ModelFamily.HUNYUAN_VIDEO, 61, 960, 544, 50, (120, 300), False
    ),
    Work(
        "HunyuanVideo 129f 1280x720",
        ModelFamily.HUNYUAN_VIDEO,
        129,
        1280,
        720,
        50,
        (120, 300),
        False,
    ),
)
# xDiT, docs/performance/hunyuanvideo.md: 129 frames at 720p, 50 steps, whole videos by Ulysses
PUBLISHED_S = {
    "H100": {1: 1904.0, 2: 925.0, 4: 514.0, 8: 338.0},
    "H20": {1: 6639.0, 2: 3401.0, 4: 1763.0, 8: 941.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel_plans", description=__doc__)
    parser.parse_args()
    print(describe_machine())
    result: dict[str, dict[str, dict[str, object]]] = {}
    for work in WORK:
        print(f"\n{work.name}, {work.num_steps} steps; 7.1: {work.wanted_s[0]:g} to ", end="")
        print(f"{work.wanted_s[1]:g} s for 16 frames")
        result[work.name] = describe(work)
    print("\nHunyuanVideo 129f 1280x720 as published by xDiT (whole video, Ulysses):")
    for gpu, seconds in PUBLISHED_S.items():
        figures = (f"{n}: {s:g} s, {seconds[1] / s / n:.0%}" for n, s in seconds.items())
        print(f"  {gpu}  " + "; ".join(figures))
    print(json.dumps(result))


def describe(work: Work) -> dict[str, dict[str, object]]:
    """Print a line for each number of GPUs: the fastest plan, its time, traffic, efficiency."""
    shape = denoise_shape(
        work.family,
        work.num_frames,
        work.width,
        work.height,
        f_patch_size=work.f_patch_size,
        guided=work.guided,
    )
    one_s = predict_step(shape, ParallelPlan(), P4D).step_s
    rows: dict[str, dict[str, object]] = {}
    for gpus in GPUS:
        plan = choose_plan(shape, gpus, P4D, work.num_steps, 0.0)
        cost = predict_step(shape, plan, P4D)
        efficiency = one_s / cost.step_s / plan.degree
        print(
            f"  {gpus:2} GPUs: {plan!s:28} {cost.step_s:8.3f} s a step, "
            f"{work.num_steps * cost.step_s:7.1f} s, {cost.bytes_sent / 1e9:6.2f} GB sent, "
            f"{100 * efficiency:5.1f} %"
        )
        rows[str(gpus)] = {
            "plan": str(plan),
            "step_s": round(cost.step_s, 4),
            "efficiency": round(efficiency, 4),
        }
    wanted = choose_plan(shape, max(GPUS), P4D, work.num_steps, work.wanted_s[1])
    seconds = work.num_steps * predict_step(shape, wanted, P4D).step_s
    verdict = "in time" if seconds <= work.wanted_s[1] else "too late, the fastest there is"
    print(f"  chosen for {work.wanted_s[1]:g} s: {wanted}, {seconds:.1f} s: {verdict}")
    return rows


if __name__ == "__main__":
    main()
