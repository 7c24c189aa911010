"""Which plan is chosen, and what is predicted of it."""

import dataclasses

import pytest

from models.cost import denoise_shape
from models.request import ModelFamily
from parallel.plan import (
    P4D,
    FrameShape,
    ParallelPlan,
    StepShape,
    TokenShape,
    choose_plan,
    plans,
    predict_step,
    quickest_plans,
)

HUNYUAN = denoise_shape(ModelFamily.HUNYUAN_VIDEO, 129, 1280, 720, guided=False)
Z_IMAGE = denoise_shape(ModelFamily.Z_IMAGE_VIDEO, 45, 1280, 720)
SVD_XT = denoise_shape(ModelFamily.SVD_XT, 25, 1024, 576)
ANIMATEDIFF = denoise_shape(ModelFamily.ANIMATEDIFF, 16, 512, 512)
SHAPES = {"hunyuan": HUNYUAN, "z-image": Z_IMAGE, "svd-xt": SVD_XT, "animatediff": ANIMATEDIFF}


def efficiency(shape: StepShape, plan: ParallelPlan) -> float:
    one = predict_step(shape, ParallelPlan(), P4D).step_s
    return one / predict_step(shape, plan, P4D).step_s / plan.degree


@pytest.mark.parametrize(
    ("shape", "plan", "published"),
    [
        # the roofline that was worked out by hand, of which this is the code
        (SVD_XT, ParallelPlan(frames=2), 0.947),
        (SVD_XT, ParallelPlan(frames=4), 0.869),
        (SVD_XT, ParallelPlan(frames=8), 0.751),
        (SVD_XT, ParallelPlan(guidance=2, frames=4), 0.858),
        (ANIMATEDIFF, ParallelPlan(frames=4), 0.959),
        (ANIMATEDIFF, ParallelPlan(guidance=2, frames=4), 0.923),
        (HUNYUAN, ParallelPlan(ulysses=2), 0.996),
        (HUNYUAN, ParallelPlan(ulysses=8), 0.992),
        (HUNYUAN, ParallelPlan(ulysses=8, ring=2), 0.992),
    ],
    ids=str,
)
def test_predictions_are_those_of_the_formulas(
    shape: StepShape, plan: ParallelPlan, published: float
) -> None:
    assert efficiency(shape, plan) == pytest.approx(published, abs=0.015)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8, 16])
def test_every_plan_keeps_to_the_gpus_and_the_nodes(name: str, gpus: int) -> None:
    shape = SHAPES[name]
    found = list(plans(shape, gpus, P4D))
    assert ParallelPlan() in found
    assert len(found) == len(set(found))
    for plan in found:
        assert plan.degree <= gpus
        assert max(plan.frames, plan.ulysses) <= P4D.gpus_per_node
        if plan.degree > 1 and shape.num_texts == 2:
            assert plan.guidance == 2
        if isinstance(shape, FrameShape):
            assert plan.frames <= shape.num_frames
            assert plan.ulysses == plan.ring == 1
        else:
            assert isinstance(shape, TokenShape)
            assert plan.frames == 1
            assert plan.ulysses <= shape.num_heads


def test_the_smallest_degree_that_is_in_time_is_chosen() -> None:
    chosen = []
    for deadline_s in (4400.0, 2400.0, 1100.0, 550.0, 300.0, 1.0):
        plan = choose_plan(HUNYUAN, 16, P4D, 50, deadline_s)
        chosen.append(plan.degree)
        smaller = [p for p in plans(HUNYUAN, 16, P4D) if p.degree < plan.degree]
        assert all(50 * predict_step(HUNYUAN, p, P4D).step_s > deadline_s for p in smaller)
    assert chosen == [1, 2, 4, 8, 16, 16]
    assert choose_plan(HUNYUAN, 4, P4D, 50, 300.0).degree == 4


def test_across_nodes_guidance_comes_first_then_the_ring() -> None:
    assert choose_plan(SVD_XT, 16, P4D, 25, 0.0) == ParallelPlan(guidance=2, frames=8)
    assert choose_plan(HUNYUAN, 16, P4D, 50, 0.0) == ParallelPlan(ulysses=8, ring=2)
    assert choose_plan(Z_IMAGE, 4, P4D, 30, 0.0) == ParallelPlan(guidance=2, ulysses=2)


def test_a_clip_is_never_shared_by_more_ranks_than_it_has_frames() -> None:
    assert isinstance(SVD_XT, FrameShape)
    short = dataclasses.replace(SVD_XT, num_frames=2)
    assert max(plan.frames for plan in plans(short, 16, P4D)) == 2


def test_a_plan_that_shares_frames_and_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="either frames or tokens"):
        ParallelPlan(frames=2, ring=2)
    with pytest.raises(ValueError, match="at least 1"):
        ParallelPlan(guidance=0)
    assert str(ParallelPlan(guidance=2, ulysses=4)) == "guidance 2 x ulysses 4"


def test_the_quickest_plan_of_each_degree_that_is_allowed() -> None:
    found = quickest_plans(Z_IMAGE, 4, P4D)
    every = list(plans(Z_IMAGE, 4, P4D))
    assert set(found) == {plan.degree for plan in every}
    for plan in every:
        quickest = predict_step(Z_IMAGE, found[plan.degree], P4D)
        assert quickest.step_s <= predict_step(Z_IMAGE, plan, P4D).step_s
    assert quickest_plans(Z_IMAGE, 4, P4D, [2]) == {2: found[2]}
    with pytest.raises(ValueError, match="4 ranks has a degree of"):
        quickest_plans(Z_IMAGE, 4, P4D, [7])
