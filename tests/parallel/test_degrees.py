"""A request that runs now on these ranks, now on others, ends as on one."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from bench.ranks import run_ranks
from models.catalog import Model, load_model
from models.control import load_control_net
from models.denoise import denoise, park, resume
from models.pausing import PausableStep
from models.request import ControlKind, VideoRequest
from models.spec import Use
from models.stages import load_denoiser, load_encoder
from models.weights import choose_device
from parallel.mesh import Mesh, MeshBuilder, aligned_groups
from parallel.plan import ParallelPlan
from training.random_checkpoint import write_random_checkpoint
from training.random_controls import (
    write_random_controlnet,
    write_random_sparse_control,
    write_random_z_image_control,
)

ALONE, TEXTS = ParallelPlan(), ParallelPlan(guidance=2)
TOKENS, ALL = ParallelPlan(ulysses=2), ParallelPlan(guidance=2, ulysses=2)
RING = ParallelPlan(guidance=2, ring=2)
FRAMES, ALL_FRAMES = ParallelPlan(frames=2), ParallelPlan(guidance=2, frames=2)
EVERYONE = (0, 1, 2, 3)
# Some ranks have made fewer steps than others when all of them meet.
OF_TOKENS = (
    (TEXTS, (0, 1)), (ALL, EVERYONE), (TOKENS, (2, 3)), (ALONE, (1,)), (RING, EVERYONE),
    (TOKENS, (0, 1)), (TEXTS, (2, 3)), (ALL, EVERYONE),
)  # fmt: skip
OF_FRAMES = (
    (TEXTS, (0, 1)), (ALL_FRAMES, EVERYONE), (FRAMES, (2, 3)), (ALONE, (1,)),
    (ParallelPlan(frames=4), EVERYONE),
)  # fmt: skip


@dataclass(frozen=True)
class Course:
    """A request of a checkpoint's, what may lead it, and on which ranks it makes which step."""

    folder: Path
    schedule: Sequence[tuple[ParallelPlan, tuple[int, ...]]]
    fields: dict[str, Any]
    controls: Sequence[tuple[Path, ControlKind]] = ()

    def model(self) -> Model:
        nets = [load_control_net(folder, folder.name, (kind,)) for folder, kind in self.controls]
        return replace(load_model(self.folder), controls=tuple(nets))

    def request(self) -> VideoRequest:
        fields = {"prompt": "a red circle", "seed": 7, "num_steps": len(self.schedule)}
        model = self.model()
        takes_image = model.start_image is Use.REQUIRED or model.start_control is not None
        start = "inputs/x" if takes_image else None
        return model.resolve({**fields, **self.fields, "start_image": start})

    def conditioning(self) -> Any:
        model, request = self.model(), self.request()
        image = io.BytesIO()
        Image.new("RGB", (request.width, request.height), "red").save(image, "PNG")
        encoder: Any = load_encoder(model)
        made = encoder.encode(request, image.getvalue() if request.start_image else None)
        if request.control is None:
            return made
        shape = (request.num_frames, request.height, request.width, 3)
        frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        return replace(made, control=encoder.encode_control(request, frames))


@dataclass(frozen=True)
class End:
    """What a course came to: the latents, the passes that it made do without, and how often this
    rank paused within a step.
    """

    latents: NDArray[np.float32]
    skipped: int
    pauses: int = 0


def follow(rank: int, courses: list[Course], other: Course | None = None) -> list[End]:
    """other: of what, wherever a step may pause, the rank meanwhile makes one alone."""
    meshes = MeshBuilder(rank, len(EVERYONE))
    act = None if other is None else a_step_of(other, meshes.mesh(ALONE, (rank,)))
    return [follow_one(rank, meshes, course, act) for course in courses]


def a_step_of(course: Course, mesh: Mesh) -> Callable[[], None]:
    request, conditioning = course.request(), course.conditioning()
    denoiser = load_denoiser(course.model())
    denoiser.use(mesh)
    state = denoiser.start(request, conditioning)
    expected = denoiser.step(request, conditioning, state).latents

    def act() -> None:
        made = denoiser.step(request, conditioning, state)
        assert torch.equal(made.latents, expected)

    return act


def follow_one(
    rank: int, meshes: MeshBuilder, course: Course, meanwhile: Callable[[], None] | None
) -> End:
    request, conditioning = course.request(), course.conditioning()
    denoiser = load_denoiser(course.model())
    parked = park(denoiser.start(request, conditioning))
    pauses = 0
    for plan, ranks in course.schedule:
        if rank in ranks:
            denoiser.use(meshes.mesh(plan, ranks))
            state = resume(parked, choose_device())
            step = partial(denoiser.step_all, [request], [conditioning], [state])
            if meanwhile is None:
                (made,) = step()
            else:
                skips = request.skips_guidance(state.step)
                num_texts = 1 if skips else conditioning.num_texts
                in_sections = PausableStep(step, denoiser.num_blocks(request, num_texts), 3)
                while not in_sections.go_on():
                    pauses += 1
                    meanwhile()
                (made,) = in_sections.result()
            parked = park(made)
        handed_on = [parked]
        dist.broadcast_object_list(handed_on, src=ranks[0])
        (parked,) = handed_on
    return End(parked.latents, parked.skipped, pauses)


def alone(_rank: int, courses: list[Course]) -> list[End]:
    """What one rank makes, with as many threads as each of several has: torch rounds by them."""
    found = []
    for course in courses:
        denoiser = load_denoiser(course.model())
        *_, last = denoise(denoiser, course.request(), course.conditioning())
        found.append(End(last.latents.numpy(), last.skipped))
    return found


WINDOWS = {"context_length": 4, "context_stride": 3}


def led_courses(animatediff: Path, folder: Path) -> list[Course]:
    """Every kind of control network; of Z-Image's, one speaks in the last layer and one before."""
    courses = []
    z_image = folder / "z-image"
    z_image.mkdir()
    write_random_checkpoint(z_image, dim=64, num_layers=3)
    for refiner in (None, "control_noise_refiner", "control_layers"):
        net = folder / f"z-image {refiner}"
        write_random_z_image_control(z_image / "transformer", net, refiner=refiner)
        fields = {"guidance_scale": 2.0, "num_frames": 5, "control": {"type": "canny"}}
        courses.append(Course(z_image, OF_TOKENS, fields, [(net, ControlKind.CANNY)]))
    places = [{"prompt": "x", "box": [0, 0, 32, 64]}, {"prompt": "y z", "frames": [2, 4]}]
    fields = {"guidance_scale": 2.0, "num_frames": 5, "regions": places}
    courses.append(Course(z_image, OF_TOKENS, fields))
    write_random_controlnet(folder / "canny")
    write_random_sparse_control(folder / "rgb")
    nets = [(folder / "canny", ControlKind.CANNY), (folder / "rgb", ControlKind.RGB)]
    fields = {"num_frames": 6, "control": {"type": "canny"}}
    return [*courses, Course(animatediff, OF_FRAMES, fields, nets)]


def skipping_courses(checkpoint: Path, random_family: Callable[[str], Path]) -> list[Course]:
    """Some steps are skipped and some are not; the last ones go without the negative text."""
    of_one_text = ((TOKENS, (2, 3)), (ParallelPlan(ulysses=2, ring=2), EVERYONE))
    fields = {"guidance_scale": 2.0, "cfg_skip_ratio": 0.25}
    courses = []
    for by, threshold, lower in (("first_block", 0.35, 0.35), ("prediction", 0.9, 0.15)):
        cache = {"step_cache": {"by": by, "threshold": threshold, "warm_up": 2}}
        courses.append(Course(checkpoint, OF_TOKENS[:6] + of_one_text, fields | cache))
        cache = {"step_cache": {"by": by, "threshold": lower, "warm_up": 2}}
        guided = {"true_cfg_scale": 2.0, "num_frames": 9, **cache}
        courses.append(Course(random_family("hunyuan-video"), OF_TOKENS, guided))
    cache = {"step_cache": {"by": "prediction", "threshold": 0.9, "warm_up": 2}}
    courses.append(Course(random_family("animatediff"), OF_FRAMES, {"num_frames": 6, **cache}))
    return courses


def test_every_degree_and_block_in_turn_ends_as_on_one_rank(
    checkpoint: Path, random_family: Callable[[str], Path], tmp_path: Path
) -> None:
    """SVD's noise has a deviation of 700, and so the rounding of its first steps."""
    guided = {"true_cfg_scale": 2.0, "num_frames": 9}
    courses = [
        Course(checkpoint, OF_TOKENS, {"guidance_scale": 2.0}),
        Course(random_family("hunyuan-video"), OF_TOKENS, guided),
        Course(random_family("hunyuan-video-concat"), OF_TOKENS, guided),
        Course(random_family("hunyuan-video-replace"), OF_TOKENS, guided),
        Course(random_family("animatediff"), OF_FRAMES, {"num_frames": 6, "scheduler": "lcm"}),
        Course(random_family("animatediff"), OF_FRAMES, {"num_frames": 11, "free_noise": WINDOWS}),
        Course(random_family("svd"), OF_FRAMES, {"num_frames": 5}),
        *led_courses(random_family("animatediff"), tmp_path),
        *skipping_courses(checkpoint, random_family),
    ]
    made = run_ranks(len(EVERYONE), follow, courses)
    (expected,) = run_ranks(1, alone, courses)
    for index, course in enumerate(courses):
        end = expected[index]
        allowed = 1e-5 * max(1.0, float(np.abs(end.latents).max()))
        for found in (by_rank[index] for by_rank in made):
            difference = np.abs(found.latents - end.latents).max()
            assert difference <= allowed, (course.folder.name, difference)
            assert found.skipped == end.skipped
        if "step_cache" in course.fields:
            most = 2 * (len(course.schedule) - 3)
            assert 0 < end.skipped < most, (course.folder.name, course.fields)


def test_steps_that_pause_for_another_model_end_in_the_same_bits(
    random_family: Callable[[str], Path], tmp_path: Path
) -> None:
    guided = {"true_cfg_scale": 2.0, "num_frames": 9}
    led = led_courses(random_family("animatediff"), tmp_path)
    z_image = led[0].folder  # of several layers
    courses = [
        Course(z_image, OF_TOKENS, {"guidance_scale": 2.0, "scheduler": "heun"}),
        Course(random_family("hunyuan-video"), OF_TOKENS, guided),
        Course(random_family("hunyuan-video-replace"), OF_TOKENS, guided),
        Course(random_family("animatediff"), OF_FRAMES, {"num_frames": 11, "free_noise": WINDOWS}),
        Course(random_family("svd"), OF_FRAMES, {"num_frames": 5}),
        *led[2:],
        *skipping_courses(z_image, random_family),
    ]
    other = Course(random_family("svd-xt"), OF_FRAMES, {"num_frames": 3})
    expected = run_ranks(len(EVERYONE), follow, courses)
    made = run_ranks(len(EVERYONE), follow, courses, other)
    for rank in EVERYONE:
        for course, end, found in zip(courses, expected[rank], made[rank], strict=True):
            assert np.array_equal(found.latents, end.latents), course
            assert found.skipped == end.skipped
            own = sum(rank in ranks for _, ranks in course.schedule)
            # who skips a step passes no block of it
            least = 0 if "step_cache" in course.fields else own
            assert least <= found.pauses <= 2 * own, course
    for index, course in enumerate(courses):
        assert any(ends[index].pauses for ends in made), course


def test_every_plan_of_an_aligned_block_finds_its_groups() -> None:
    groups = aligned_groups(8)
    assert groups == sorted(set(groups))
    for ranks in ((0, 1), (6, 7), (4, 5, 6, 7), (0, 2, 4, 6), (1, 5), (3, 4, 5), tuple(range(8))):
        assert ranks in groups
    assert (1, 2) not in groups
