"""What a tier is asked for, from groups of jobs and the costs of stages."""

import math
from dataclasses import replace

import pytest

from autoscaling.demand import SMOOTH_S, Horizon, measure_demand
from autoscaling.simulated_scaling import NODE, KindCosts
from autoscaling.stage_costs import StageCosts, TierGpus
from autoscaling.tiers import GpuTier
from autoscaling.urgency import UrgencyConfig, judge
from autoscaling.workloads import ANIMATEDIFF, KINDS, VideoKind
from jobs.demand import JobGroup
from jobs.job import Phase
from jobs.stage_times import TimedStage
from models.catalog import Model
from models.cost import VideoShape

LONG = KINDS[-1]
NEAR = Horizon(cold_start_s=0.0, late_s=600.0, pulling_priority=0)


def group(kind: VideoKind, num_jobs: int = 1, **changes: object) -> JobGroup:
    shape = VideoShape(kind.num_frames, kind.width, kind.height, 1, guided=True)
    made = JobGroup(
        tier="a100",
        model=kind.name,
        shape=str(shape),
        sample=None,
        priority=1,
        is_running=False,
        age_s=0.0,
        num_jobs=num_jobs,
        num_steps=num_jobs * kind.num_steps,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_work_is_counted_in_gpu_seconds_that_are_left() -> None:
    open_groups = [
        group(ANIMATEDIFF, 4),
        group(LONG, is_running=True, left=0.25),
        group(LONG, tier="t4"),
        group(LONG, model="no longer served"),
    ]
    found = measure_demand(NODE, open_groups, [], [], KindCosts(), UrgencyConfig(), NEAR)
    assert found.queued_s == pytest.approx(4 * ANIMATEDIFF.work_s)
    assert found.running_s == pytest.approx(LONG.work_s / 4)


def test_a_request_is_due_when_the_step_scheduler_thinks_so() -> None:
    waiting = group(LONG, age_s=100.0, priority=2)
    found = measure_demand(NODE, [waiting], [], [], KindCosts(), UrgencyConfig(), NEAR)
    judged = judge(
        UrgencyConfig(), priority=2, admitted_s=-100.0, num_steps=50, step_s=LONG.measured_s
    )
    assert found.due == ((judged.deadline_s, LONG.work_s),)


def test_due_work_adds_up_and_those_who_may_not_pull_are_left_out() -> None:
    horizon = replace(NEAR, pulling_priority=1)
    open_groups = [group(LONG), group(ANIMATEDIFF), group(LONG, priority=0)]
    found = measure_demand(NODE, open_groups, [], [], KindCosts(), UrgencyConfig(), horizon)
    works = [work_s for _, work_s in found.due]
    assert works == pytest.approx([ANIMATEDIFF.work_s, ANIMATEDIFF.work_s + LONG.work_s])
    assert found.queued_s == pytest.approx(ANIMATEDIFF.work_s + 2 * LONG.work_s)


def test_what_is_too_late_for_a_new_node_has_time() -> None:
    """However late it is, it asks for no more nodes than would end it in late_s."""
    horizon = replace(NEAR, cold_start_s=360.0)
    late = group(ANIMATEDIFF, age_s=9999.0)
    found = measure_demand(NODE, [late], [], [], KindCosts(), UrgencyConfig(), horizon)
    assert found.due == ((960.0, ANIMATEDIFF.work_s),)


def test_the_rate_is_a_mean_that_forgets_and_one_standard_error() -> None:
    ages = range(5, int(3 * SMOOTH_S), 10)
    steady = [group(ANIMATEDIFF, 10, age_s=float(age_s)) for age_s in ages]
    found = measure_demand(NODE, [], steady, [], KindCosts(), UrgencyConfig(), NEAR)
    mean = ANIMATEDIFF.work_s * (1 - math.exp(-3))
    assert mean < found.per_s < 1.1 * mean
    few = [group(LONG, age_s=450.0)]
    found = measure_demand(NODE, [], few, [], KindCosts(), UrgencyConfig(), NEAR)
    assert found.per_s == pytest.approx(2 * LONG.work_s * math.exp(-0.5) / SMOOTH_S)
    assert found.idle_s == 450.0


def test_usual_is_what_came_on_most_days() -> None:
    days = [[group(ANIMATEDIFF, count)] if count else [] for count in (0, 10, 20, 30, 40)]
    found = measure_demand(NODE, [], [], days, KindCosts(), UrgencyConfig(), NEAR)
    assert found.usual_per_s == pytest.approx(32 * ANIMATEDIFF.work_s / SMOOTH_S)
    one_day = measure_demand(NODE, [], [], days[4:], KindCosts(), UrgencyConfig(), NEAR)
    assert one_day.usual_per_s == pytest.approx(40 * ANIMATEDIFF.work_s / SMOOTH_S)
    assert measure_demand(NODE, [], [], [], KindCosts(), UrgencyConfig(), NEAR).usual_per_s == 0.0


def test_measured_steps_correct_the_others_of_their_model(model: Model) -> None:
    """The demo's steps are those of a far smaller model than the predicted one."""
    gpus = TierGpus(GpuTier.LOCAL)
    small, large = (VideoShape(13, side, side, 1, guided=True) for side in (64, 256))
    predicted = StageCosts({"m": model})
    exact = predicted.step_s("m", small, gpus)[1]
    known = {TimedStage("m", str(small), "local", Phase.DENOISE, 1): exact / 50}
    corrected = StageCosts({"m": model}, known)
    assert corrected.step_s("m", small, gpus) == {1: exact / 50}
    assert corrected.step_work_s("m", large, gpus) == pytest.approx(
        predicted.step_work_s("m", large, gpus) / 50
    )
    elsewhere = TierGpus(GpuTier.A100)
    assert corrected.step_s("m", large, elsewhere) == predicted.step_s("m", large, elsewhere)


def test_a_smaller_gpu_takes_longer(model: Model) -> None:
    costs, shape = StageCosts({"m": model}), VideoShape(13, 256, 256, 1, guided=True)
    seconds = {
        tier: costs.step_work_s("m", shape, TierGpus(tier))
        for tier in (GpuTier.T4, GpuTier.A10G, GpuTier.A100)
    }
    assert seconds[GpuTier.T4] == pytest.approx(seconds[GpuTier.A100] * 312 / 65)
    assert seconds[GpuTier.A10G] == pytest.approx(seconds[GpuTier.A100] * 312 / 70)
    assert costs.decode_s("m", shape, GpuTier.T4) > costs.decode_s("m", shape, GpuTier.A100)


@pytest.mark.parametrize("guided", [True, False])
def test_a_shape_is_read_as_it_is_written(guided: bool) -> None:
    shape = VideoShape(129, 1280, 720, 2, guided=guided)
    assert VideoShape.parse(str(shape)) == shape
