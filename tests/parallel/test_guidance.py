"""Guidance shared by ranks, on top of shared tokens or frames."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import shard_cases
from bench.ranks import run_ranks
from models.transformer_sharding import shard_z_image
from models.unet_sharding import shard_frames
from parallel.guidance import predict_each
from parallel.mesh import Mesh, MeshBuilder
from parallel.plan import ParallelPlan
from parallel.process_group import alone
from parallel.shard import Shard, split_sizes

pytestmark = pytest.mark.parallel

# what the published pipelines take by default; Stable Video Diffusion's rises from 1 to this
Z_IMAGE_GUIDANCE, SVD_GUIDANCE = 5.0, 3.0
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
NUM_FRAMES = 5
PLANS = [
    ParallelPlan(guidance=2),
    ParallelPlan(guidance=2, ulysses=2),
    ParallelPlan(guidance=2, ring=2),
    ParallelPlan(guidance=2, frames=2),
]
Predict = Callable[[int], Tensor]


def guided(scale: float, predictions: list[Tensor]) -> Tensor:
    positive, negative = predictions
    return negative + scale * (positive - negative)


def predict_tokens() -> tuple[Predict, Callable[[Mesh], Callable[[Tensor], Tensor]]]:
    """The prediction of one text, and what shares it."""
    case = shard_cases.z_image(heads=2, num_layers=2)
    sharding = shard_z_image(case.model)

    def share(mesh: Mesh) -> Callable[[Tensor], Tensor]:
        sharding.use(mesh.part, mesh.ulysses, mesh.ring)
        return lambda whole: whole

    return case.call, share


def predict_frames() -> tuple[Predict, Callable[[Mesh], Callable[[Tensor], Tensor]]]:
    """The same of a UNet, of which each rank makes some frames."""
    case = shard_cases.svd(NUM_FRAMES)
    sharding = shard_frames(case.model)
    here = [slice(0, NUM_FRAMES)]

    def share(mesh: Mesh) -> Callable[[Tensor], Tensor]:
        own = Shard(split_sizes(NUM_FRAMES, mesh.part.size), mesh.part.rank)
        sharding.use(mesh.part, NUM_FRAMES)
        here[0] = slice(own.offset, own.offset + own.size)
        return lambda whole: own.cut(whole, case.frame_dim - 1)

    return lambda text: case.call(here[0])[text], share


def differences(rank: int, dtype: torch.dtype, plan: ParallelPlan) -> tuple[float, float, int]:
    """From one process's result, also with the texts swapped; bytes sent between their ranks."""
    torch.set_default_dtype(dtype)
    predict, share = predict_frames() if plan.frames > 1 else predict_tokens()
    scale = SVD_GUIDANCE if plan.frames > 1 else Z_IMAGE_GUIDANCE
    whole = guided(scale, predict_each(alone(), [0, 1], predict))
    builder = MeshBuilder(rank, plan.degree)
    mesh = builder.mesh(plan, tuple(range(plan.degree)))
    wanted = share(mesh)(whole)
    sent: list[int] = []

    def counted(text: int) -> Tensor:
        prediction = predict(text)
        sent.append(builder.traffic.bytes_sent.total())
        return prediction

    predictions = predict_each(mesh.guidance, [0, 1], counted)
    between = builder.traffic.bytes_sent.total() - sent[-1]
    shared = float((guided(scale, predictions) - wanted).abs().max())
    swapped = float((guided(scale, predictions[::-1]) - wanted).abs().max())
    return shared, swapped, between


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_shared_guidance_is_that_of_one_process(plan: ParallelPlan, dtype: torch.dtype) -> None:
    for shared, swapped, _ in run_ranks(plan.degree, differences, dtype, plan):
        assert shared <= EXACT[dtype]
        assert swapped > 0.1, "the texts' order must matter"


def test_texts_meet_once_a_step() -> None:
    answers = run_ranks(2, differences, torch.float32, ParallelPlan(guidance=2))
    assert {between for _, _, between in answers} == {4 * 4 * 6 * 6 * 4}


def few_texts(rank: int) -> tuple[str, int]:
    mesh = MeshBuilder(rank, 3).mesh(ParallelPlan(guidance=3), (0, 1, 2))
    (alone,) = predict_each(mesh.guidance, [7], torch.tensor)
    try:
        predict_each(mesh.guidance, [1, 2], torch.tensor)
    except ValueError as error:
        return str(error), int(alone)
    return "taken", int(alone)


def test_more_ranks_than_texts_are_refused_but_all_may_make_a_single_one() -> None:
    assert predict_each(alone(), [2, 3], torch.tensor) == [2, 3]
    assert set(run_ranks(3, few_texts)) == {("2 texts cannot be shared by 3 ranks", 7)}
