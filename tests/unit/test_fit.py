"""What a request takes of a GPU's memory: predicted, measured, and as admission goes by it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaling.room import Room, TierRoom
from autoscaling.tiers import GpuTier, ServedOn
from bench.fit import (
    H200,
    PUBLISHED,
    SMALL,
    TIERS,
    Claim,
    compare,
    published_model,
    request_of,
    small_models,
)
from deployments.config import GpuConfig, TierConfig
from deployments.tier_room import rooms_of
from models.catalog import Model, load_model, read_manifest
from models.compute import Compute, Dtype, WeightStorage
from models.fit import USABLE, Affine, Gpus, decode_footprint, denoise_footprint, place
from models.request import InvalidRequest, VideoRequest

MUTOSCOPE = Path(sys.executable).with_name("mutoscope")
GB = 10**9


def families(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """All of them, for a parametrized test; those that are not quick count as long."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return small_models(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def find(name: str) -> Model:
        if name not in made:
            made[name] = published_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


@pytest.mark.parametrize("family", families(SMALL, ["z-image-video", "hunyuan-video"]))
def test_a_step_and_a_decode_take_what_was_predicted(small: dict[str, Model], family: str) -> None:
    """Within 10 %; a prediction that grows half as fast would be found out."""
    decodes = family != "hunyuan-video"  # which takes a minute to find out how its tiles attend
    found = compare(small[family], decodes=decodes, **SMALL[family][0])
    assert len(found) == 1 + decodes
    assert all(abs(each.error) <= 0.1 for each in found), found
    memory = small[family].manifest.memory
    assert memory is not None
    line = memory.denoiser.four_bytes
    slower = Affine(base=line.base, per_unit=line.per_unit / 2)
    denoiser = memory.denoiser.model_copy(update={"four_bytes": slower})
    manifest = small[family].manifest.model_copy(
        update={"memory": memory.model_copy(update={"denoiser": denoiser})}
    )
    wrong = replace(small[family], manifest=manifest)
    request = wrong.resolve({"prompt": "x", **SMALL[family][0]})
    slow = denoise_footprint(wrong, request, 1, Dtype.FLOAT32).beside
    assert slow < 0.8 * found[0].measured


@pytest.mark.long
@pytest.mark.parametrize(("size", "guided", "peak_gb"), H200, ids=list(PUBLISHED))
def test_full_size_is_what_a_gpu_took(
    published: Callable[[str], Model], size: Claim, guided: bool, peak_gb: float
) -> None:
    """An H200's peaks of one step, which `bench.one_gpu` measured; its allocator rounds up."""
    model = published(size.published)
    request = request_of(model, size, **({} if guided else {"guidance_scale": 1.0}))
    found = denoise_footprint(model, request, 1, Dtype.BFLOAT16)
    assert found.total / GB == pytest.approx(peak_gb, rel=0.04)


@pytest.mark.long
def test_the_largest_videos_are_placed_on_eight_gpus(published: Callable[[str], Model]) -> None:
    hunyuan = published("hunyuan-video")
    largest = request_of(hunyuan, Claim("", 129, 1280, 720, ""))
    eight = place(hunyuan, largest, TIERS["a100 (8 x 40 GB)"])
    assert eight is not None
    assert (eight.weights, eight.degree > 1) == (WeightStorage.WHOLE, True)
    alone = place(hunyuan, largest, replace(TIERS["a100 (8 x 40 GB)"], count=1))
    assert alone is not None
    assert (alone.weights, alone.degree) == (WeightStorage.FP8, 1)
    assert place(hunyuan, largest, TIERS["t4 (1 x 16 GB)"]) is None
    short = request_of(hunyuan, Claim("", 17, 640, 480, ""))
    on_a10g = place(hunyuan, short, TIERS["a10g (1 x 24 GB)"])
    assert on_a10g is not None
    assert on_a10g.weights is WeightStorage.FP8


@pytest.mark.parametrize("name", families(PUBLISHED, ["hunyuan-video"]))
def test_more_ranks_and_smaller_numbers_take_less(
    published: Callable[[str], Model], name: str
) -> None:
    model = published(name)
    request = request_of(model, Claim("", 16, 512, 512, ""))
    taken = [denoise_footprint(model, request, d, Dtype.BFLOAT16).beside for d in (1, 2, 4, 8)]
    assert taken == sorted(taken, reverse=True)
    wide = denoise_footprint(model, request, 1, Dtype.FLOAT32)
    assert wide.weights == 2 * denoise_footprint(model, request, 1, Dtype.BFLOAT16).weights
    assert wide.beside > 1.5 * taken[0]
    for kind in (WeightStorage.FP8, WeightStorage.OFFLOADED):
        stored = replace(model, compute=Compute(weights=kind))
        found = denoise_footprint(stored, request, 1, Dtype.BFLOAT16)
        assert found.weights < 0.8 * wide.weights / 2
        assert found.beside == taken[0]


def room_of(model: Model, memory_bytes: int, count: int = 1, **more: Any) -> Room:
    gpus = Gpus(memory_bytes, count, Dtype.FLOAT32)
    return Room(model, {GpuTier.A100: TierRoom(gpus, **more)})


def with_small_decoder(model: Model) -> Model:
    """The tiny ones' decoders are larger than their denoisers."""
    memory = model.manifest.memory
    assert memory is not None
    nothing = {"two_bytes": Affine(base=0, per_unit=0), "four_bytes": Affine(base=0, per_unit=0)}
    decoder = memory.decoder.model_copy(update={**nothing, "parameters": 1})
    update = {"memory": memory.model_copy(update={"decoder": decoder})}
    return replace(model, manifest=model.manifest.model_copy(update=update))


@pytest.mark.parametrize("family", ["z-image-video", "animatediff", "hunyuan-video"])
def test_what_is_refused_is_told_the_largest_that_would_fit(
    small: dict[str, Model], family: str
) -> None:
    model = with_small_decoder(small[family])
    served = ServedOn(tier=GpuTier.A100)

    def ask(**fields: Any) -> VideoRequest:
        return model.resolve({"prompt": "x", "seed": 1, "width": 256, "height": 256, **fields})

    middle, largest = ask(num_frames=9), ask(num_frames=16)
    limit = denoise_footprint(model, middle, 1, Dtype.FLOAT32).total / USABLE
    room = room_of(model, int(limit) + 1)
    assert room.fits(middle, served)
    assert not room.fits(largest, served)
    refused = room.refuse(largest, [served])
    assert isinstance(refused, InvalidRequest)
    assert refused.param == "num_frames"
    most = int(refused.message.rsplit("the most are ", 1)[1].split()[0])
    assert 9 <= most < 16
    assert room.fits(ask(num_frames=most), served)
    assert not room.fits(ask(num_frames=most + 1), served)
    width, height = map(int, refused.message.split("so many of ")[1].split(" ")[0].split("x"))
    assert room.fits(ask(num_frames=16, width=width, height=height), served)
    tiny = room_of(model, 1 << 20)
    assert tiny.refuse(largest, [served]).param == "size"


def test_frames_that_cannot_be_decoded_whole_may_be_in_tiles(small: dict[str, Model]) -> None:
    model = small["z-image-video"]
    request = model.resolve({"prompt": "x", "num_frames": 5, "width": 512, "height": 512})
    whole = decode_footprint(model, request, Dtype.FLOAT32).total
    served = ServedOn(tier=GpuTier.A100)
    assert room_of(model, int(whole)).fits(request, served)
    assert room_of(model, int(whole), tiled_above=1).fits(request, served)
    assert not room_of(model, int(whole), tiled_above=512 * 512).fits(request, served)


def test_only_degrees_at_which_a_step_fits_are_allowed(small: dict[str, Model]) -> None:
    model = small["z-image-video"]
    request = model.resolve({"prompt": "x", "num_frames": 29, "width": 320, "height": 320})
    of_two = denoise_footprint(model, request, 2, Dtype.FLOAT32).total
    gpus = Gpus(int(of_two / USABLE) + 1, 4, Dtype.FLOAT32)
    assert TierRoom(gpus).degrees_for(model, request) == [2, 4]
    assert TierRoom(gpus, degrees=(1, 4)).degrees_for(model, request) == [4]
    assert TierRoom(gpus, resident=of_two).degrees_for(model, request) == []


def test_a_tier_whose_gpus_are_told_needs_to_know_its_models(
    small: dict[str, Model], checkpoint: Path
) -> None:
    tier = TierConfig(tier=GpuTier.T4, gpu=GpuConfig(memory_bytes=16 * GB))
    with pytest.raises(ValueError, match="mutoscope models memory"):
        rooms_of(tier, [load_model(checkpoint)])
    assert rooms_of(TierConfig(tier=GpuTier.T4), [load_model(checkpoint)]) == {}
    two = [small["z-image-video"], replace(small["animatediff"], id="other")]
    rooms = rooms_of(tier, two)
    other = two[1].manifest.memory
    assert other is not None
    resident = other.denoiser.weights(Dtype.FLOAT16)
    assert rooms["z-image-video"].resident == resident
    assert rooms["z-image-video"].gpus.dtype is Dtype.FLOAT16


def test_the_command_finds_out_what_a_checkpoint_takes(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    command = [str(MUTOSCOPE), "models", "memory", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = read_manifest(folder).memory
    assert memory is not None
    assert json.loads(done.stdout) == memory.model_dump(exclude_none=True)
