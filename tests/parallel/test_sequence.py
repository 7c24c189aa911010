"""Tokens shared by ranks: every rank ends with what one process makes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import shard_cases
from bench.ranks import run_ranks
from bench.shard_cases import TokenCase
from models.transformer_sharding import shard_hunyuan_video, shard_z_image
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan, ring_bytes, ulysses_bytes
from parallel.sequence import SequenceSharding

pytestmark = pytest.mark.parallel

# float64 leaves nothing to rounding: what is shared must be the same sum, not nearly the same
EXACT = {torch.float32: 5e-6, torch.float64: 1e-12}
DTYPES = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)]
MAKERS: dict[str, tuple[Callable[..., TokenCase], Callable[[Any], SequenceSharding]]] = {
    "z-image": (shard_cases.z_image, shard_z_image),
    "hunyuan": (shard_cases.hunyuan, shard_hunyuan_video),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "z-image": ("z-image", {"frames": 8, "size": 8}),
    "z-image, 5 heads, longer text": ("z-image", {"heads": 5, "text": 40}),
    "z-image, patches of 2, control": ("z-image", {"f_patch": 2, "control": True}),
    "z-image, patches of 4": ("z-image", {"f_patch": 4, "frames": 8, "size": 10}),
    "hunyuan, 75 and 7 tokens": ("hunyuan", {}),
    "hunyuan, 5 heads, 2 tokens of text": ("hunyuan", {"heads": 5, "text": 2}),
    "hunyuan, token replace": ("hunyuan", {"token_replace": True}),
}
PLANS = [
    ParallelPlan(ulysses=2),
    ParallelPlan(ulysses=3),
    ParallelPlan(ulysses=4),
    ParallelPlan(ring=2),
    ParallelPlan(ring=3),
    ParallelPlan(ring=4),
    ParallelPlan(ulysses=2, ring=2),
]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences from one process's result; the naive one has nothing shared."""

    shared: float
    naive: float
    bytes_sent: dict[str, int]
    calls: dict[str, int]


def compare(rank: int, plan: ParallelPlan, dtype: torch.dtype) -> dict[str, Comparison]:
    torch.set_default_dtype(dtype)
    return {name: _compare(rank, plan, *case) for name, case in CASES.items()}


def _compare(rank: int, plan: ParallelPlan, model: str, fields: dict[str, Any]) -> Comparison:
    make, shard = MAKERS[model]
    case = make(**fields)
    whole = case.call(0)
    sharding = shard(case.model)
    assert torch.equal(case.call(0), whole), "prepared, but not shared"
    builder = MeshBuilder(rank, plan.degree)
    mesh = builder.mesh(plan, tuple(range(plan.degree)))
    sharding.use(mesh.part, mesh.ulysses, mesh.ring)
    shared = case.call(0)
    traffic = dict(builder.traffic.bytes_sent), dict(builder.traffic.calls)
    vars(sharding)["attend"] = own_tokens_only
    naive = case.call(0)
    return Comparison(
        float((shared - whole).abs().max()), float((naive - whole).abs().max()), *traffic
    )


def own_tokens_only(
    query: Tensor, key: Tensor, value: Tensor, _lengths: list[int], _restriction: None = None
) -> Tensor:
    """What a rank would make that does not talk to the others."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@functools.cache
def comparisons(plan: ParallelPlan, dtype: torch.dtype) -> list[dict[str, Comparison]]:
    """By rank, then by case."""
    return run_ranks(plan.degree, compare, plan, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shared_tokens_give_what_one_process_gives(
    name: str, plan: ParallelPlan, dtype: torch.dtype
) -> None:
    for of_rank in comparisons(plan, dtype):
        assert of_rank[name].shared <= EXACT[dtype]
        assert of_rank[name].naive > 0.01, "without sharing it must be wrong"


@pytest.mark.parametrize(
    "plan", [ParallelPlan(ulysses=2), ParallelPlan(ulysses=4), ParallelPlan(ring=4)], ids=str
)
def test_attention_sends_what_the_formula_says(plan: ParallelPlan) -> None:
    image, text, width = 8 * 16, 32, 16 * 4
    activations = [image * width * 4] * 2 + [(image + text) * width * 4] * 3
    for of_rank in comparisons(plan, torch.float32):
        found = of_rank["z-image"]
        if plan.ulysses > 1:
            formula = sum(ulysses_bytes(a, plan.ulysses, plan.degree) for a in activations)
            assert found.bytes_sent["all_to_all"] == pytest.approx(formula, rel=0.02)
            assert found.calls["all_to_all"] == 2 * len(activations)
        else:
            formula = sum(ring_bytes(a, plan.ring, plan.degree) for a in activations)
            assert found.bytes_sent["pass_on"] == pytest.approx(formula, rel=0.02)
        assert found.calls["all_gather"] == 2


def refusal(rank: int, name: str) -> str:
    mesh = MeshBuilder(rank, 2).mesh(ParallelPlan(ulysses=2), (0, 1))
    if name == "masked text":
        case, shard = shard_cases.hunyuan(), shard_hunyuan_video
    else:
        heads = 1 if name == "few heads" else 2
        case, shard = shard_cases.z_image(heads=heads), shard_z_image
    shard(case.model).use(mesh.part, mesh.ulysses, mesh.ring)
    latents = [torch.zeros(4, 4, 4, 4)] * 2
    texts = [torch.zeros(4, 16), torch.zeros(40, 16)]
    calls: dict[str, Callable[[], Any]] = {
        "masked text": lambda: case.model(
            torch.zeros(1, 4, 3, 4, 4),
            torch.tensor([1]),
            torch.zeros(1, 3, 16),
            torch.tensor([[1, 1, 0]]),
            torch.zeros(1, 8),
            torch.tensor([1.0]),
        ),
        "masked batch": lambda: case.model(latents, torch.tensor([0.1, 0.1]), texts),
        "few heads": lambda: case.model(latents[:1], torch.tensor([0.1]), texts[:1]),
    }
    try:
        calls[name]()
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("masked text", "takes no mask"),
        ("masked batch", "takes no mask"),
        ("few heads", "1 heads cannot be shared by 2 ranks"),
    ],
)
def test_what_cannot_be_shared_exactly_is_refused(name: str, message: str) -> None:
    for answer in run_ranks(2, refusal, name):
        assert message in answer
