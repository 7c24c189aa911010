"""Frames shared by ranks: what each makes, joined, is what one process makes of them all."""

import functools
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from bench import shard_cases
from bench.ranks import run_ranks
from models.unet_sharding import shard_frames
from parallel.frames import FrameGroupNorm, FrameHaloConv3d, FrameSharding
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan, all_to_all_bytes

pytestmark = pytest.mark.parallel

EXACT = 5e-6
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
    bytes_sent: dict[str, int]


def compare(rank: int, num_ranks: int) -> list[Comparison]:
    return [_compare(rank, name, num_frames, num_ranks) for name, num_frames in CLIPS[num_ranks]]


def _compare(rank: int, name: str, num_frames: int, num_ranks: int) -> Comparison:
    everything = slice(0, num_frames)
    case = CASES[name](num_frames)
    whole = case.call(everything)
    sharding = shard_frames(case.model)
    assert torch.equal(case.call(everything), whole), "prepared, but not shared"
    builder = MeshBuilder(rank)
    mesh = builder.mesh(ParallelPlan(frames=num_ranks), tuple(range(num_ranks)))
    frames = sharding.use(mesh.part, num_frames)
    here = slice(frames.offset, frames.offset + frames.size)
    wanted = whole.narrow(case.frame_dim, frames.offset, frames.size)
    shared = case.call(here)
    calls, sent = dict(builder.traffic.calls), dict(builder.traffic.bytes_sent)
    sharding.use(builder.mesh(ParallelPlan(), (rank,)).part, num_frames)
    naive = case.call(here)
    assert torch.equal(case.call(everything), whole), "shared no more"
    return Comparison(_difference(shared, wanted), _difference(naive, wanted), calls, sent)


@functools.cache
def comparisons(num_ranks: int) -> list[list[Comparison]]:
    """By clip, then by rank."""
    by_rank = run_ranks(num_ranks, compare, num_ranks)
    return [list(of_clip) for of_clip in zip(*by_rank, strict=True)]


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("num_ranks", "name", "num_frames"),
    [(ranks, *clip) for ranks, clips in CLIPS.items() for clip in clips],
)
def test_shared_frames_are_those_of_one_process(num_ranks: int, name: str, num_frames: int) -> None:
    for found in comparisons(num_ranks)[CLIPS[num_ranks].index((name, num_frames))]:
        assert found.shared <= EXACT
        assert found.naive > 0.05, "without sharing it must be wrong"


@pytest.mark.parametrize(("num_frames", "num_ranks"), [(16, 2), (16, 4), (18, 4)])
def test_motion_modules_send_what_the_formula_says(num_frames: int, num_ranks: int) -> None:
    sizes = motion_activations(num_frames)
    clip = CLIPS[num_ranks].index(("animatediff", num_frames))
    for rank, found in enumerate(comparisons(num_ranks)[clip]):
        frames = num_frames // num_ranks + (rank < num_frames % num_ranks)
        formula = all_to_all_bytes(sum(sizes), num_frames, frames, num_ranks)
        assert found.calls["all_to_all"] == 2 * len(sizes)
        assert found.bytes_sent["all_to_all"] == pytest.approx(formula, rel=0.02)


@torch.inference_mode()
def motion_activations(num_frames: int) -> list[int]:
    """Bytes of what each run of temporal blocks is given, in one process."""
    case = shard_cases.animatediff(num_frames)
    sizes: list[int] = []
    for module in case.model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.proj_in.register_forward_hook(lambda _m, _a, out: sizes.append(out.nbytes))
    case.call(slice(0, num_frames))
    return sizes


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
    mesh = MeshBuilder(rank).mesh(ParallelPlan(frames=2), (0, 1))
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
    mesh = MeshBuilder(rank).mesh(ParallelPlan(frames=2), (0, 1))
    try:
        FrameSharding().use(mesh.part, 1)
    except ValueError as error:
        return str(error)
    return "taken"


def test_fewer_frames_than_ranks_are_refused() -> None:
    assert set(run_ranks(2, too_few)) == {"1 frames cannot be shared by 2 ranks"}
