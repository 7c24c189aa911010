"""Guidance shared by ranks, on top of shared tokens or frames."""

import pytest
import torch
from torch import Tensor

from bench import shard_cases
from bench.ranks import run_ranks
from models.transformer_sharding import shard_z_image
from parallel.guidance import predict_each
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan
from parallel.process_group import alone

pytestmark = pytest.mark.parallel

GUIDANCE = 3.0
EXACT = 1e-5  # guidance multiplies what rounding leaves


def guided_difference(rank: int, plan: ParallelPlan, swapped: bool) -> tuple[float, int]:
    """From one process's result, and the bytes sent between the texts' ranks."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, 6, 6, generator=generator)
    texts = [torch.randn(n, 16, generator=generator) for n in (20, 40)]
    model = shard_cases.z_image(num_layers=1).model

    def predict(text: Tensor) -> Tensor:
        prediction: Tensor = model([latents], torch.tensor([0.4]), [text]).sample[0]
        return prediction

    def guided(positive: Tensor, negative: Tensor) -> Tensor:
        return negative + GUIDANCE * (positive - negative)

    whole = guided(*predict_each(alone(), texts, predict))
    builder = MeshBuilder(rank)
    mesh = builder.mesh(plan, tuple(range(plan.degree)))
    shard_z_image(model).use(mesh.part, mesh.ulysses, mesh.ring)
    before = builder.traffic.bytes_sent["all_gather"]
    predictions = predict_each(mesh.guidance, texts, predict)
    sent = builder.traffic.bytes_sent["all_gather"] - before
    if swapped:
        predictions.reverse()
    return float((guided(*predictions) - whole).abs().max()), sent


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(guidance=2),
        ParallelPlan(guidance=2, ulysses=2),
        ParallelPlan(guidance=2, ring=2),
    ],
    ids=str,
)
def test_shared_guidance_is_that_of_one_process(plan: ParallelPlan) -> None:
    for difference, _ in run_ranks(plan.degree, guided_difference, plan, False):
        assert difference <= EXACT
    for difference, _ in run_ranks(plan.degree, guided_difference, plan, True):
        assert difference > 0.1, "the texts' order must matter"


def test_texts_meet_once_a_step() -> None:
    answers = run_ranks(2, guided_difference, ParallelPlan(guidance=2), False)
    assert {sent for _, sent in answers} == {4 * 4 * 6 * 6 * 4}


def test_more_ranks_than_texts_are_refused() -> None:
    assert predict_each(alone(), [2, 3], lambda text: torch.tensor(text)) == [2, 3]
    answers = run_ranks(2, one_text)
    assert set(answers) == {"1 texts cannot be shared by 2 ranks"}


def one_text(rank: int) -> str:
    mesh = MeshBuilder(rank).mesh(ParallelPlan(guidance=2), (0, 1))
    try:
        predict_each(mesh.guidance, [1], lambda text: torch.tensor(text))
    except ValueError as error:
        return str(error)
    return "taken"
