"""Passes that are skipped: when, and that nothing but the state decides it."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bench.ranks import run_ranks
from models.catalog import Model, load_model
from models.checkpoint import Checkpoint, pack, unpack
from models.denoise import denoise, park, resume
from models.request import InvalidRequest, NotSupported, VideoRequest
from models.skipping_quality import MOST_DB, SkippingQuality, psnr_db, write_measured
from models.spec import Use
from models.stages import Denoiser, load_denoiser, load_encoder
from models.step_cache import agreed
from models.tensors import DenoiseState
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan
from tests.unit.test_families import RandomFamily, png
from training.random_checkpoint import write_random_checkpoint

MUTOSCOPE = Path(sys.executable).with_name("mutoscope")
FAMILIES = ["z-image-video", "animatediff", "svd", "hunyuan-video"]
TRANSFORMERS = ["z-image-video", "hunyuan-video"]
WAYS = [("prediction", family) for family in FAMILIES]
WAYS += [("first_block", family) for family in TRANSFORMERS]


def told_of(model: Model, request: VideoRequest) -> Any:
    """What the request is made from."""
    is_started = model.spec.start_image is Use.REQUIRED
    image = png(request.width, request.height) if is_started else None
    return load_encoder(model).encode(request, image)


class Course:
    """A guided request of a family's tiny checkpoint, and what it is made from."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.model = load_model(folder)
        is_hunyuan = self.model.manifest.family == "hunyuan-video"
        guided = {"true_cfg_scale" if is_hunyuan else "guidance_scale": 3.0}
        self.fields = {"prompt": "a red circle", "seed": 3, "num_steps": 8, **guided, **fields}
        self.denoiser: Denoiser[Any] = load_denoiser(self.model)
        self.conditioning = told_of(self.model, self.request())

    def request(self, **fields: Any) -> VideoRequest:
        return self.model.resolve({**self.fields, **fields})

    def states(self, **fields: Any) -> list[DenoiseState]:
        return list(denoise(self.denoiser, self.request(**fields), self.conditioning))

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """The texts of each pass that went to its end."""
        texts: list[int] = []
        denoiser: Any = self.denoiser
        unet = getattr(denoiser, "unet", None)
        network = denoiser.transformer if unet is None else unet.unet

        def count(_network: Any, _args: Any, output: Any) -> None:
            predicted = output[0] if isinstance(output, tuple) else output.sample
            texts.append(len(predicted))

        hook = network.register_forward_hook(count)
        try:
            yield texts
        finally:
            hook.remove()


@pytest.fixture(scope="module")
def courses(checkpoint: Path, random_family: RandomFamily) -> dict[str, Course]:
    folders = {name: random_family(name) for name in FAMILIES if name != "z-image-video"}
    return {
        name: Course(folder) for name, folder in {**folders, "z-image-video": checkpoint}.items()
    }


def cache(by: str, threshold: float, **more: Any) -> dict[str, Any]:
    return {"step_cache": {"by": by, "threshold": threshold, **more}}


def same(left: DenoiseState, right: DenoiseState) -> bool:
    return torch.equal(left.latents, right.latents) and left.skipped == right.skipped


@pytest.mark.parametrize(("by", "family"), WAYS)
def test_what_changes_too_much_is_predicted_anew(
    courses: dict[str, Course], by: str, family: str
) -> None:
    course = courses[family]
    (*_, whole), (*_, last) = course.states(), course.states(**cache(by, 1e-9))
    assert last.skipped == whole.skipped == 0
    assert torch.equal(last.latents, whole.latents)


@pytest.mark.parametrize(("by", "family"), WAYS)
def test_all_steps_between_the_first_and_the_last_may_be_skipped(
    courses: dict[str, Course], by: str, family: str
) -> None:
    """A threshold that nothing reaches; the model is asked for just the passes that are charged."""
    course = courses[family]
    with course.counted() as texts:
        states = course.states(**huge(by, course, warm_up=3))
    assert [state.skipped for state in states] == [0, 0, 0, 2, 4, 6, 8, 8]
    assert sum(texts) == 2 * 8 - 8
    whole = course.states()
    assert torch.equal(states[2].latents, whole[2].latents)
    assert not torch.equal(states[3].latents, whole[3].latents)


def huge(by: str, course: Course, **more: Any) -> dict[str, Any]:
    """More than a request may ask for: random weights change their mind by more than all of it."""
    made = course.request(**cache(by, 1.0, **more)).step_cache
    assert made is not None
    return {"step_cache": made.model_copy(update={"threshold": 1e9})}


@pytest.mark.parametrize(("by", "family"), WAYS)
def test_a_request_that_is_parked_goes_on_with_the_same_bits(
    courses: dict[str, Course], by: str, family: str
) -> None:
    """At every step, through a checkpoint's bytes, by a denoiser that knows of nothing before."""
    course = courses[family]
    fields = huge(by, course) | {"cfg_skip_ratio": 0.25}
    request = course.request(**fields)
    states = course.states(**fields)
    fresh = load_denoiser(course.model)
    for before, after in itertools.pairwise(states):
        kept = pack(Checkpoint(park(before), ParallelPlan(), "", ""))
        again = resume(unpack(kept).state, torch.device("cpu"))
        assert same(fresh.step(request, course.conditioning, again), after)


def test_without_what_it_kept_it_would_go_on_otherwise(courses: dict[str, Course]) -> None:
    """The negative control of the test before."""
    course = courses["z-image-video"]
    fields = huge("prediction", course)
    states = course.states(**fields)
    lost = replace(states[4], cache={})
    made = course.denoiser.step(course.request(**fields), course.conditioning, lost)
    assert not same(made, states[5])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_steps_may_go_without_the_negative_text(
    courses: dict[str, Course], family: str
) -> None:
    course = courses[family]
    with course.counted() as texts:
        states = course.states(cfg_skip_ratio=0.3)
    assert [state.skipped for state in states] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert sum(texts) == 6 * 2 + 2
    whole = course.states()
    assert torch.equal(states[5].latents, whole[5].latents)
    scale = "true_cfg_scale" if family == "hunyuan-video" else "guidance_scale"
    unguided = course.request(**{scale: 1.0})
    told = told_of(course.model, unguided)
    expected = course.denoiser.step(unguided, told, states[5])
    assert torch.equal(states[6].latents, expected.latents)


def test_the_first_block_alone_is_asked_before_a_step_is_skipped(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, dim=64, num_layers=3)
    course = Course(tmp_path)
    calls = {"first": 0, "last": 0}
    layers = course.denoiser.transformer.layers  # type: ignore[attr-defined]

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    hooks = [layers[0].register_forward_hook(count("first"), prepend=True)]
    hooks.append(layers[-1].register_forward_hook(count("last")))
    course.states(**huge("first_block", course, warm_up=2))
    for hook in hooks:
        hook.remove()
    assert calls == {"first": 8, "last": 3}


def decide(rank: int) -> list[bool]:
    """Rank 1 would decide otherwise than rank 0, in either kind of group."""
    meshes = MeshBuilder(rank, 2)
    plans = ParallelPlan(guidance=2), ParallelPlan(ulysses=2)
    device = torch.device("cpu")
    found = [agreed(rank == 0, meshes.mesh(plan, (0, 1)), device) for plan in plans]
    dist.barrier()
    return found


def test_one_rank_decides_for_all() -> None:
    assert run_ranks(2, decide) == [[True, True], [True, True]]


@pytest.mark.parametrize(
    ("family", "param", "fields"),
    [
        ("svd", "step_cache", {"step_cache": {"by": "first_block", "threshold": 0.1}}),
        ("animatediff", "step_cache", {"step_cache": {"by": "first_block", "threshold": 0.1}}),
        ("z-image-video", "step_cache.threshold", {"step_cache": {"threshold": 0.0}}),
        ("z-image-video", "step_cache.threshold", {"step_cache": {}}),
        ("z-image-video", "step_cache.by", {"step_cache": {"threshold": 0.1, "by": "luck"}}),
        ("z-image-video", "step_cache.warm_up", {"step_cache": {"threshold": 0.1, "warm_up": 0}}),
        ("z-image-video", "cfg_skip_ratio", {"cfg_skip_ratio": 1.5}),
        ("z-image-video", "cfg_skip_ratio", {"cfg_skip_ratio": 0.2, "guidance_scale": 1.0}),
        ("z-image-video", "cfg_skip_ratio", {"cfg_skip_ratio": 0.2, "scheduler": "heun"}),
        ("z-image-video", "step_cache", {"step_cache": {"threshold": 0.1}, "scheduler": "heun"}),
    ],
)
def test_what_cannot_be_skipped_is_refused_by_name(
    courses: dict[str, Course], family: str, param: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        courses[family].request(**fields)
    assert refused.value.param == param


def test_what_skips_shares_no_step_with_others(courses: dict[str, Course]) -> None:
    course = courses["z-image-video"]
    assert course.denoiser.batch(course.request()) is not None
    assert course.denoiser.batch(course.request(**cache("prediction", 0.1))) is None
    assert course.denoiser.batch(course.request(cfg_skip_ratio=0.5)) is None


def test_psnr() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == MOST_DB
    assert psnr_db(black + np.uint8(255), black) == pytest.approx(0.0)
    assert psnr_db(black + np.uint8(1), black) == pytest.approx(48.13, abs=0.01)


def test_what_was_measured_is_told_of_just_that_way(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    model = load_model(folder)
    fields = {"prompt": "x", "seed": 1, "num_steps": 6, "guidance_scale": 2.0}
    quality = SkippingQuality(model)
    measured = quality.measure([fields, {**fields, "seed": 2}], {"cfg_skip_ratio": 0.5})
    assert (measured.num_videos, measured.passes_made) == (2, 0.75)
    assert 5 < measured.min_psnr_db <= measured.psnr_db < MOST_DB
    write_measured(folder, measured)
    write_measured(folder, measured.model_copy(update={"psnr_db": 1.0, "min_psnr_db": 1.0}))
    manifest = load_model(folder).manifest
    assert len(manifest.skipping) == 1  # in place of the first

    def told(**asked: Any) -> float | None:
        found = manifest.measured_skipping(model.resolve({**fields, **asked}))
        return None if found is None else found.psnr_db

    assert told(cfg_skip_ratio=0.5) == 1.0
    assert told(cfg_skip_ratio=0.25) is told(cfg_skip_ratio=0.5, num_steps=7) is told() is None
    with pytest.raises(InvalidRequest):
        quality.measure([fields], {})
    with pytest.raises(NotSupported):
        quality.measure([{**fields, "scheduler": "heun"}], {"cfg_skip_ratio": 0.5})


def test_the_operators_command_measures_and_writes(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)

    def measure(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(MUTOSCOPE), "models", "measure", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = measure("--prompt", "x", "--steps", "6", "--step-cache", "0.9", "--warm-up", "2")
    assert done.returncode == 0, done.stderr
    (written,) = load_model(folder).manifest.skipping
    assert json.loads(done.stdout) == written.model_dump(mode="json", exclude_none=True)
    assert written.step_cache is not None
    assert (written.step_cache.warm_up, written.num_steps) == (2, 6)
    refused = measure("--prompt", "x", "--cfg-skip", "3")
    assert refused.returncode == 1
    assert "cfg_skip_ratio" in refused.stderr


@pytest.mark.parametrize(
    ("fields", "unguided"),
    [
        ({"num_steps": 20, "cfg_skip_ratio": 0.25}, range(15, 20)),
        ({"num_steps": 20, "cfg_skip_ratio": 0.5, "denoising_end": 0.5}, range(5, 10)),
        ({"num_steps": 20, "cfg_skip_ratio": 0.25, "denoising_start": 0.8}, range(19, 20)),
        ({"num_steps": 3, "cfg_skip_ratio": 0.25}, range(0)),
    ],
)
def test_the_ratio_is_of_the_steps_that_are_made(
    courses: dict[str, Course], fields: dict[str, Any], unguided: range
) -> None:
    request = courses["z-image-video"].request(**fields)
    steps = range(request.first_step, request.last_step)
    assert [step for step in steps if request.skips_guidance(step)] == list(unguided)
