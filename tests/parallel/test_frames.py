"""Frames shared by ranks: what each makes, joined, is what one process makes of them all."""

import functools
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from bench import shard_cases
from bench.ranks import run_ranks
from bench.shard_steps import NUM_FRAMES, frame_step
from models.unet_sharding import shard_frames
from parallel.frames import FrameGroupNorm, FrameHaloConv3d, FrameSharding
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan

pytestmark = pytest.mark.parallel

# float64 leaves nothing to rounding: what is shared must be the same sum, not nearly the same
EXACT = {torch.float32: 5e-6, torch.float64: 1e-12}
DTYPES = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)]
CASES = {
    "animatediff": shard_cases.animatediff,
    "svd": shard_cases.svd,
    "svd-decoder": shard_cases.svd_decoder,
}
# names and frame counts, by ranks: as even and as uneven as they come
CLIPS = {
    2: [("animatediff", 16), ("animatediff", 7), ("svd", 14), ("svd", 25), ("svd-decoder", 5)],
    3: [("animatediff", 16), ("svd", 14), ("svd-decoder", 7)],
    4: [
        ("animatediff", 16),
        ("animatediff", 18),
        ("svd", 25),
        ("svd", 4),
        ("svd-decoder", 25),
    ],
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences from one process's result; the naive one has nothing shared."""

    shared: float
    naive: float
    calls: dict[str, int]


def compare(rank: int, num_ranks: int, dtype: torch.dtype) -> list[Comparison]:
    torch.set_default_dtype(dtype)
    return [_compare(rank, name, num_frames, num_ranks) for name, num_frames in CLIPS[num_ranks]]


def _compare(rank: int, name: str, num_frames: int, num_ranks: int) -> Comparison:
    everything = slice(0, num_frames)
    case = CASES[name](num_frames)
    whole = case.call(everything)
    sharding = shard_frames(case.model)
    assert torch.equal(case.call(everything), whole), "prepared, but not shared"
    builder = MeshBuilder(rank, num_ranks)
    mesh = builder.mesh(ParallelPlan(frames=num_ranks), tuple(range(num_ranks)))
    frames = sharding.use(mesh.part, num_frames)
    here = slice(frames.offset, frames.offset + frames.size)
    wanted = whole.narrow(case.frame_dim, frames.offset, frames.size)
    shared = case.call(here)
    calls = dict(builder.traffic.calls)
    sharding.use(builder.mesh(ParallelPlan(), (rank,)).part, num_frames)
    naive = case.call(here)
    assert torch.equal(case.call(everything), whole), "shared no more"
    return Comparison(_difference(shared, wanted), _difference(naive, wanted), calls)


@functools.cache
def comparisons(num_ranks: int, dtype: torch.dtype) -> list[list[Comparison]]:
    """By clip, then by rank."""
    by_rank = run_ranks(num_ranks, compare, num_ranks, dtype)
    return [list(of_clip) for of_clip in zip(*by_rank, strict=True)]


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_ranks", "name", "num_frames"),
    [(ranks, *clip) for ranks, clips in CLIPS.items() for clip in clips],
)
def test_shared_frames_are_those_of_one_process(
    num_ranks: int, name: str, num_frames: int, dtype: torch.dtype
) -> None:
    for found in comparisons(num_ranks, dtype)[CLIPS[num_ranks].index((name, num_frames))]:
        assert found.shared <= EXACT[dtype]
        assert found.naive > 0.05, "without sharing it must be wrong"


def count_bytes(rank: int, num_ranks: int) -> list[tuple[int, float]]:
    """What a step of each UNet sent, and the formulas: all-to-alls, halos, moments."""
    builder = MeshBuilder(rank, num_ranks)
    mesh = builder.mesh(ParallelPlan(frames=num_ranks), tuple(range(num_ranks)))
    counted = []
    for make in (shard_cases.animatediff, shard_cases.svd):
        step = frame_step(make(NUM_FRAMES), mesh)
        step.use(mesh)
        before = builder.traffic.bytes_sent.total()
        step.call()
        counted.append((builder.traffic.bytes_sent.total() - before, step.formula_bytes))
    return counted


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_send_what_the_formulas_say(num_ranks: int) -> None:
    for of_rank in run_ranks(num_ranks, count_bytes, num_ranks):
        for sent, formula in of_rank:
            assert sent == pytest.approx(formula, rel=0.02)


def test_motion_modules_make_two_all_to_alls_each() -> None:
    model = shard_cases.animatediff(2).model
    modules = [m for m in model.modules() if isinstance(m, AnimateDiffTransformer3D)]
    for found in comparisons(2, torch.float32)[CLIPS[2].index(("animatediff", 16))]:
        assert found.calls["all_to_all"] == 2 * len(modules)


def without(rank: int, broken: list[str]) -> list[float]:
    """The errors when one kind of replacement is left out."""
    return [_without(rank, name) for name in broken]


def _without(rank: int, broken: str) -> float:
    num_frames = 5
    whole = shard_cases.svd(num_frames).call(slice(0, num_frames))
    case = shard_cases.svd(num_frames)
    sharding = shard_frames(case.model)
    for module in case.model.modules():
        if type(module).__name__ == broken:
            vars(module)["sharding"] = FrameSharding()
    mesh = MeshBuilder(rank, 2).mesh(ParallelPlan(frames=2), (0, 1))
    frames = sharding.use(mesh.part, num_frames)
    shared = case.call(slice(frames.offset, frames.offset + frames.size))
    return _difference(shared, whole.narrow(case.frame_dim, frames.offset, frames.size))


def test_each_replacement_is_needed() -> None:
    names = ["FrameGroupNorm", "FrameHaloConv3d", "FrameOffset"]
    by_rank = run_ranks(2, without, names)
    for name, errors in zip(names, zip(*by_rank, strict=True), strict=True):
        assert max(errors) > 1e-3, name


def test_parameters_keep_their_names_and_storage() -> None:
    model = shard_cases.svd(2).model
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    shard_frames(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert any(isinstance(module, FrameGroupNorm) for module in model.modules())
    assert any(isinstance(module, FrameHaloConv3d) for module in model.modules())


def test_a_model_that_mixes_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear mixes frames"):
        shard_frames(torch.nn.Linear(2, 2))


def too_few(rank: int) -> str:
    mesh = MeshBuilder(rank, 2).mesh(ParallelPlan(frames=2), (0, 1))
    try:
        FrameSharding().use(mesh.part, 1)
    except ValueError as error:
        return str(error)
    return "taken"


def test_fewer_frames_than_ranks_are_refused() -> None:
    assert set(run_ranks(2, too_few)) == {"1 frames cannot be shared by 2 ranks"}
