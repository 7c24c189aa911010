"""What our stages add to a denoise step: CPU-seconds against diffusers' own pipeline.

In one process, without Ray; random checkpoints as large as makes a step take half a second; ours
and the stock one take turns. For z-image-video, which diffusers has no pipeline for, the other side
is a straight loop over its transformer and scheduler.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import stock_pipelines
from bench.machine import describe_machine
from models.catalog import load_model
from models.denoise import denoise
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder
from models.z_image_video import ZImageVideoDenoiser
from training.random_checkpoint import write_random_checkpoint
from training.random_families import (
    write_random_animatediff,
    write_random_hunyuan_video,
    write_random_svd,
)

STEPS = 3  # a run's; the first one pays for what is done once
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint of a family, what is asked of it, and how diffusers does the same.

    stock: given the folder, the request and its conditioning, what runs all steps and calls
    whatever it is given after each.
    """

    write: Callable[[Path], None]
    fields: dict[str, Any]
    stock: Callable[[Path, VideoRequest, Any], Callable[[Callable[[], None]], None]]


def start_image(request: VideoRequest) -> bytes:
    pixels = np.zeros((request.height, request.width, 3), np.uint8)
    pixels[: request.height // 2] = (200, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def stock_pipeline(
    build: Callable[[Path], Any],
    arguments: Callable[[VideoRequest], dict[str, Any]],
    folder: Path,
    request: VideoRequest,
    _conditioning: Any,
) -> Callable[[Callable[[], None]], None]:
    pipeline = build(folder)
    given = {
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_steps,
        "output_type": "latent",
        **arguments(request),
    }

    def run(after_step: Callable[[], None]) -> None:
        def note(_pipe: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            after_step()
            return kept

        pipeline(
            **given,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=note,
        )

    return run


def straight_loop(
    folder: Path, request: VideoRequest, conditioning: Any
) -> Callable[[Callable[[], None]], None]:
    denoiser = ZImageVideoDenoiser(load_model(folder))
    transformer = denoiser.transformer
    positive, negative = (
        torch.tensor(text) for text in (conditioning.positive, conditioning.negative)
    )

    @torch.inference_mode()
    def run(after_step: Callable[[], None]) -> None:
        latents = denoiser.start(request, conditioning).latents.clone()
        scheduler = denoiser.schedules.schedule(request, denoiser.device)
        for timestep in scheduler.timesteps:
            time_left = ((1000 - timestep) / 1000).expand(2)
            two = [latents[0], latents[0]]
            found = transformer(two, time_left, [positive, negative], return_dict=False)[0]
            guided = found[0] + (request.guidance_scale - 1) * (found[0] - found[1])
            latents = scheduler.step(-guided[None], timestep, latents, return_dict=False)[0]
            after_step()

    return run


def words(request: VideoRequest) -> dict[str, Any]:
    return {"prompt": request.prompt, "guidance_scale": request.guidance_scale}


def image(request: VideoRequest) -> dict[str, Any]:
    picture = Image.open(io.BytesIO(start_image(request)))
    return {"image": picture, "fps": request.fps, "max_guidance_scale": request.guidance_scale}


CASES = {
    "z-image-video": Case(
        partial(write_random_checkpoint, dim=256, num_layers=6),
        {"num_frames": 37, "width": 192, "height": 192, "guidance_scale": 4.0},
        straight_loop,
    ),
    "animatediff": Case(
        partial(write_random_animatediff, width=64),
        {"num_frames": 16, "width": 256, "height": 256},
        partial(stock_pipeline, stock_pipelines.animatediff, words),
    ),
    "svd": Case(
        partial(write_random_svd, num_frames=14),
        {"width": 256, "height": 256},
        partial(stock_pipeline, stock_pipelines.svd, image),
    ),
    "svd-xt": Case(
        partial(write_random_svd, num_frames=25),
        {"width": 256, "height": 192},
        partial(stock_pipeline, stock_pipelines.svd, image),
    ),
    "hunyuan-video": Case(
        partial(write_random_hunyuan_video, num_heads=16, num_layers=3),
        {"num_frames": 33, "width": 256, "height": 192},
        partial(stock_pipeline, stock_pipelines.hunyuan_video, words),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__)
    parser.add_argument("--families", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    print(f"{'':16}{'stock s':>9}{'ours s':>9}{'overhead':>10}   CPU-seconds a step, medians")
    overhead = {}
    for family in arguments.families:
        stock, ours = measure(CASES[family])
        overhead[family] = round(statistics.median(ours) / statistics.median(stock), 4)
        medians = f"{statistics.median(stock):9.3f}{statistics.median(ours):9.3f}"
        print(f"{family:16}{medians}{overhead[family]:10.3f}   of {len(ours)} each", flush=True)
    print(json.dumps({"overhead": overhead}))


def measure(case: Case) -> tuple[list[float], list[float]]:
    """CPU-seconds of steps, the stock one's and ours, in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case.write(folder)
        model = load_model(folder)
        fields = {"prompt": "a red circle", "seed": 3, "num_steps": STEPS, **case.fields}
        request = model.resolve(fields)
        picture = start_image(request) if model.spec.start_image == "required" else None
        conditioning = load_encoder(model).encode(request, picture)
        denoiser = load_denoiser(model)
        run_stock = case.stock(folder, request, conditioning)

        def run_ours(after_step: Callable[[], None]) -> None:
            for _ in denoise(denoiser, request, conditioning):
                after_step()

        stock: list[float] = []
        ours: list[float] = []
        for turn in range(ROUNDS):
            sides: Sequence[tuple[Any, list[float]]] = ((run_stock, stock), (run_ours, ours))
            for run, found in sides if turn % 2 else sides[::-1]:
                found += step_seconds(run)
    return stock, ours


def step_seconds(run: Callable[[Callable[[], None]], None]) -> list[float]:
    """Of every step but the first."""
    moments: list[float] = []
    run(lambda: moments.append(time.process_time()))
    return [after - before for before, after in itertools.pairwise(moments)]


if __name__ == "__main__":
    main()
