"""What one CUDA GPU does: a step of each family at full size, and the demo model's own promises.

Full-size transformers and UNets with random weights, in the GPU's own dtype: seconds and memory of
one step beside the operations that `models.cost` counts, so that the share of the card's peak that
`parallel.plan` supposes can be held against one that was measured. Then the shipped model on the
GPU: the same pixels twice and after a checkpoint, how far a shared step is from one made alone, and
whether a lack of memory leaves nothing behind.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from bench.generator import Generator
from bench.machine import describe_machine
from models.compute import Compute
from models.cost import denoise_shape
from models.denoise import park, resume
from models.memory import OutOfMemory, within_memory
from models.request import ModelFamily, VideoRequest
from models.tensors import DenoiseState
from models.weights import choose_device, choose_dtype
from parallel.plan import P4D, FrameShape, TokenShape

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, TIMED = 2, 5


@dataclass(frozen=True, slots=True)
class Case:
    """A family at full size: how to make its model, and one step of num_texts texts."""

    name: str
    family: ModelFamily
    num_frames: int
    width: int
    height: int
    guided: bool
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def animatediff() -> Case:
    """Two texts, 16 frames."""
    return Case(
        "AnimateDiff 16f 512x512",
        ModelFamily.ANIMATEDIFF,
        *(16, 512, 512),
        True,
        lambda: UNetMotionModel(
            cross_attention_dim=768, num_attention_heads=8, motion_num_attention_heads=8
        ),
        lambda: (
            (torch.randn(2, 4, 16, 64, 64), torch.tensor(500), torch.randn(32, 77, 768)),
            {"return_dict": False},
        ),
    )


def svd_xt() -> Case:
    """Two texts, 25 frames."""
    return Case(
        "SVD-XT 25f 1024x576",
        ModelFamily.SVD_XT,
        *(25, 1024, 576),
        True,
        lambda: UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20)),
        lambda: (
            (
                torch.randn(2, 25, 8, 72, 128),
                torch.tensor(0.5),
                torch.randn(2, 1, 1024),
                torch.randn(2, 3),
            ),
            {"return_dict": False},
        ),
    )


def z_image(num_frames: int = 45, width: int = 1280, height: int = 720) -> Case:
    """One text of 512 tokens, f_patch 1."""
    latents = (16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    return Case(
        f"Z-Image {num_frames}f {width}x{height}",
        ModelFamily.Z_IMAGE_VIDEO,
        *(num_frames, width, height),
        False,
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2, 2, 2),
            all_f_patch_size=(1, 2, 4),
            # Rotary frequencies for as many frames and texts, which the image model has too.
            axes_lens=[1536, 512, 512],
        ),
        lambda: (
            ([torch.randn(latents)], torch.tensor([0.5]), [torch.randn(512, 2560)]),
            {"patch_size": 2, "f_patch_size": 1, "return_dict": False},
        ),
    )


def hunyuan(num_frames: int = 61, width: int = 960, height: int = 544) -> Case:
    """Embedded guidance: one text of 256 tokens."""
    latents = (1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    return Case(
        f"HunyuanVideo {num_frames}f {width}x{height}",
        ModelFamily.HUNYUAN_VIDEO,
        *(num_frames, width, height),
        False,
        HunyuanVideoTransformer3DModel,
        lambda: (
            (
                torch.randn(latents),
                torch.tensor([500]),
                torch.randn(1, 256, 4096),
                torch.ones(1, 256, dtype=torch.int64),
                torch.randn(1, 768),
                torch.tensor([6000.0]),
            ),
            {"return_dict": False},
        ),
    )


CASES = {
    "animatediff": animatediff,
    "svd-xt": svd_xt,
    "z-image-video": z_image,
    "hunyuan-video": hunyuan,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.one_gpu", description=__doc__)
    parser.add_argument("--families", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    device = choose_device()
    if device.type != "cuda":
        parser.error("torch sees no CUDA device")
    print(describe_machine())
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {choose_dtype(device, Compute())}")
    result: dict[str, Any] = {"device": name, "steps": {}}
    for family in arguments.families:
        result["steps"][family] = time_step(CASES[family](), device)
    result["demo"] = try_demo()
    print(json.dumps(result))


def time_step(case: Case, device: torch.device) -> dict[str, float]:
    """Median seconds of a step, its share of what the plan supposes, weights and peak in GB."""
    dtype = choose_dtype(device, Compute())
    torch.cuda.empty_cache()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = case.build().eval().requires_grad_(False)
            positional, named = case.inputs()
    finally:
        torch.set_default_dtype(torch.float32)
    model.to(device)  # diffusers makes some parameters on the CPU all the same
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    with torch.inference_mode():
        for _ in range(WARM_UP + TIMED):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model(*positional, **named)
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    step_s = statistics.median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated()
    shape = denoise_shape(case.family, case.num_frames, case.width, case.height, guided=case.guided)
    match shape:
        case FrameShape():
            flops = shape.flops
        case TokenShape():
            flops = shape.linear_flops + shape.attention_flops
    reached = flops / step_s
    print(
        f"{case.name}: {step_s:.3f} s a step (first {seconds[0]:.2f}), {flops / 1e12:.0f} TFLOP, "
        f"{reached / 1e12:.0f} TFLOP/s (an A100 is supposed to do {P4D.flops_per_s / 1e12:.0f}), "
        f"weights {weights / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB",
        flush=True,
    )
    return {
        "step_s": round(step_s, 4),
        "tflops_per_s": round(reached / 1e12, 1),
        "weights_gb": round(weights / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3),
    }


class Demo(Generator):
    """The shipped model on the GPU, step by step."""

    def request(self, prompt: str, **fields: Any) -> VideoRequest:
        """As admission would fill it in."""
        return self.model.resolve({"prompt": prompt, "seed": 1, **fields})

    def steps(
        self, requests: list[VideoRequest], *, parked_at: int | None = None
    ) -> list[DenoiseState]:
        """The last states, all requests sharing each step; parked and resumed once if asked."""
        conditionings = [self.encoder.encode(request, None) for request in requests]
        states = [
            self.denoiser.start(request, conditioning)
            for request, conditioning in zip(requests, conditionings, strict=True)
        ]
        for step in range(requests[0].num_steps):
            if step == parked_at:
                states = [resume(park(state), choose_device()) for state in states]
            states = self.denoiser.step_all(requests, conditionings, states)
        return states

    def pixels(self, request: VideoRequest, state: DenoiseState) -> Any:
        """uint8 [F, H, W, 3]."""
        latents = park(state).latents
        return np.concatenate([f.pixels for f in self.decoder.decode(request, latents)])


def try_demo() -> dict[str, Any]:
    """Equal twice and after a checkpoint; a shared step against one alone; a lack of memory."""
    demo = Demo(ROOT / "models" / "demo")
    one, other = demo.request("a red circle moving right"), demo.request("a blue square, still")
    alone = demo.pixels(one, demo.steps([one])[0])
    again = demo.pixels(one, demo.steps([one])[0])
    resumed = demo.pixels(one, demo.steps([one], parked_at=7)[0])
    shared = demo.pixels(one, demo.steps([one, other])[0])
    found: dict[str, Any] = {
        "same_twice": bool((alone == again).all()),
        "same_resumed": bool((alone == resumed).all()),
        "shared_step_psnr_db": psnr(alone, shared),
        **lack_memory(demo),
    }
    found["same_after_lack"] = bool((alone == demo.pixels(one, demo.steps([one])[0])).all())
    for name, value in found.items():
        print(f"demo: {name} {value}")
    return found


def lack_memory(demo: Demo) -> dict[str, Any]:
    """A step that does not fit says so, and what it had taken is free again."""
    large = demo.request("a red circle", width=512, height=512, num_frames=49, num_steps=1)
    before = torch.cuda.memory_allocated()
    allowed = (before + (64 << 20)) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed)
    try:
        within_memory("demo", lambda: demo.steps([large]))
        told = False
    except OutOfMemory:
        told = True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    left = torch.cuda.memory_allocated() - before
    return {"lack_is_told": told, "bytes_left_after_lack": left}


def psnr(one: Any, other: Any) -> float | None:
    """In dB over all pixels; None if they are equal."""
    error = float(((one.astype(float) - other.astype(float)) ** 2).mean())
    return None if error == 0 else round(10 * float(np.log10(255**2 / error)), 2)


if __name__ == "__main__":
    main()
