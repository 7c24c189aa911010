"""What fits where: each family at full size on the tiers' GPUs, and prediction against measurement.

The first table places published sizes on the GPUs of each tier by `models.fit`, beside what the
publishers and others claim. The second holds the prediction against what one step took on an H200
(`python -m bench.one_gpu`). The third runs small random checkpoints of each family for real: the
peak of what torch allocated (its profiler's memory events) in a denoise step and in the decode.
"""

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch.profiler import ProfilerActivity, profile

from bench.generator import png
from bench.machine import describe_machine
from models.catalog import Model, ModelManifest, RequestDefaults, load_model
from models.compute import Dtype
from models.families import WITHOUT_PROMPT
from models.fit import Gpus, decode_footprint, denoise_footprint, place
from models.memory_profile import peak_bytes, profile_memory
from models.request import ModelFamily, VideoRequest
from models.spec import LAYOUTS, Use
from models.stages import load_decoder, load_denoiser, load_encoder
from training.random_checkpoint import write_random_checkpoint
from training.random_families import RANDOM_FAMILIES

GB = 1e9
TIERS = {
    "t4 (1 x 16 GB)": Gpus(16 * 10**9, 1, Dtype.FLOAT16),
    "a10g (1 x 24 GB)": Gpus(24 * 10**9, 1, Dtype.BFLOAT16),
    "a100 (8 x 40 GB)": Gpus(40 * 10**9, 8, Dtype.BFLOAT16),
}
IMAGE_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
}
UP = {"up_block_types": ["UpDecoderBlock2D"] * 4}


@dataclass(frozen=True, slots=True)
class Published:
    """A family's networks, by folder, and how its requests come by default."""

    family: ModelFamily
    networks: dict[str, tuple[Any, dict[str, Any]]]
    guidance_scale: float
    max_text_tokens: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A size at which somebody says what it takes, or at which a GPU was measured."""

    published: str
    num_frames: int
    width: int
    height: int
    said: str


PUBLISHED = {
    "animatediff": Published(
        ModelFamily.ANIMATEDIFF,
        {
            "unet": (
                UNetMotionModel,
                {
                    "cross_attention_dim": 768,
                    "num_attention_heads": 8,
                    "motion_num_attention_heads": 8,
                },
            ),
            "vae": (AutoencoderKL, {**IMAGE_VAE, **UP}),
        },
        7.5,
        77,
    ),
    "svd-xt": Published(
        ModelFamily.SVD_XT,
        {
            "unet": (UNetSpatioTemporalConditionModel, {"num_attention_heads": (5, 10, 20, 20)}),
            "vae": (AutoencoderKLTemporalDecoder, IMAGE_VAE),
        },
        3.0,
        77,
    ),
    "z-image-video": Published(
        ModelFamily.Z_IMAGE_VIDEO,
        {
            "transformer": (
                ZImageTransformer2DModel,
                {
                    "all_patch_size": (2, 2, 2),
                    "all_f_patch_size": (1, 2, 4),
                    "axes_lens": [1536, 512, 512],
                },
            ),
            "vae": (AutoencoderKLWan, {"z_dim": 16}),
        },
        4.0,
        512,
    ),
    "hunyuan-video": Published(
        ModelFamily.HUNYUAN_VIDEO,
        {
            "transformer": (HunyuanVideoTransformer3DModel, {}),
            "vae": (AutoencoderKLHunyuanVideo, {}),
        },
        6.0,
        256,
    ),
}
CLAIMS = (
    Claim("animatediff", 16, 512, 512, "founding document ~8 GB; older README ~12 GB in all"),
    Claim("animatediff", 32, 768, 768, "-"),
    Claim("svd-xt", 14, 1024, 576, "diffusers <8 GB with offload and chunks"),
    Claim("svd-xt", 25, 1024, 576, "issues: ~40 GB where all frames are decoded at once"),
    Claim("z-image-video", 17, 832, 480, "founding document: fits 16 GB (image model)"),
    Claim("z-image-video", 49, 1280, 720, "-"),
    Claim("z-image-video", 129, 1280, 720, "-"),
    Claim("hunyuan-video", 61, 960, 544, "diffusers ~14 GB with nf4 and offload"),
    Claim("hunyuan-video", 129, 960, 544, "Tencent 45 GB in all"),
    Claim("hunyuan-video", 129, 1280, 720, "Tencent 60 GB in all"),
)
# Peaks of one step on an NVIDIA H200, in GB, weights included; as docs/benchmarks.md has them.
H200 = (
    (Claim("animatediff", 16, 512, 512, ""), True, 4.870),
    (Claim("svd-xt", 25, 1024, 576, ""), True, 11.421),
    (Claim("z-image-video", 45, 1280, 720, ""), False, 17.776),
    (Claim("hunyuan-video", 61, 960, 544, ""), True, 29.347),
)


def published_model(folder: Path, name: str) -> Model:
    """A model of the published architecture, without weights, with its memory found out."""
    published = PUBLISHED[name]
    for part, (component, config) in published.networks.items():
        with torch.device("meta"):
            component(**config).save_config(folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    defaults = RequestDefaults(
        num_frames=16,
        width=512,
        height=512,
        fps=8,
        num_steps=25,
        guidance_scale=published.guidance_scale,
    )
    manifest = ModelManifest(
        family=published.family,
        description=name,
        trained=False,
        licence="none",
        vae="published",
        max_text_tokens=published.max_text_tokens,
        min_frames=1,
        max_frames=129,
        max_side=4096,
        max_area=4096**2,
        defaults=defaults,
    )
    manifest = manifest.model_copy(update={"memory": profile_memory(folder, manifest)})
    return Model(name, folder, manifest, LAYOUTS[published.family].read(folder))


def request_of(model: Model, claim: Claim, **fields: Any) -> VideoRequest:
    """A request of a claim's size."""
    size = {"num_frames": claim.num_frames, "width": claim.width, "height": claim.height}
    return model.resolve({"prompt": "x", "seed": 1, **size, **fields})


def print_placements(models: dict[str, Model]) -> dict[str, Any]:
    """The first table; what it says of the largest size of HunyuanVideo on 40 GB cards."""
    print(f"{'':34}{'on':18}{'degree':>7}{'weights':>10}{'tiles':>6}{'denoise':>9}{'decode':>8} GB")
    largest: dict[str, Any] = {}
    for claim in CLAIMS:
        model = models[claim.published]
        request = request_of(model, claim)
        size = f"{claim.published} {claim.num_frames}f {claim.width}x{claim.height}"
        for tier, gpus in TIERS.items():
            found = place(model, request, gpus)
            told = size if tier == next(iter(TIERS)) else ""
            if found is None:
                print(f"{told:34}{tier:18}{'fits not':>7}")
                continue
            tiles = "yes" if found.in_tiles else "no"
            print(
                f"{told:34}{tier:18}{found.degree:7}{found.weights:>10}{tiles:>6}"
                f"{found.denoise.total / GB:9.1f}{found.decode.total / GB:8.1f}"
            )
            if (claim.published, claim.num_frames, claim.width) == ("hunyuan-video", 129, 1280):
                largest[tier] = {"degree": found.degree, "weights": found.weights}
        print(f"    claimed: {claim.said}")
    return largest


def measured_peak(act: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator held at once beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def small_models(folder: Path) -> dict[str, Model]:
    """Random checkpoints of all families, with their memory found out."""
    models = {}
    for name in ("z-image-video", "animatediff", "svd", "svd-xt", "hunyuan-video"):
        (folder / name).mkdir()
        if name == "z-image-video":
            write_random_checkpoint(folder / name, dim=128, num_layers=3)
        else:
            RANDOM_FAMILIES[name](folder / name)
        model = load_model(folder / name)
        memory = profile_memory(model.folder, model.manifest)
        limits = {"max_side": 1024, "max_area": 1024**2, "memory": memory}
        models[name] = replace(model, manifest=model.manifest.model_copy(update=limits))
    return models


@dataclass(frozen=True, slots=True)
class Compared:
    """Bytes beside the weights."""

    predicted: float
    measured: int

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def compare(model: Model, *, decodes: bool = True, **fields: Any) -> list[Compared]:
    """A step, by what the allocator held, and the decode, by the tensors that lived: the CPU's 3D
    convolutions take more for themselves than for these, and a GPU's do not.
    """
    scale = {"true_cfg_scale": 2.0} if model.manifest.family == "hunyuan-video" else {}
    words = "a red circle moving right " * 100  # as many as are taken
    fixed = {"prompt": words, "seed": 1, "num_steps": 2, **scale}
    if model.manifest.family not in WITHOUT_PROMPT:
        fixed["negative_prompt"] = words
    request = model.resolve({**fixed, **fields})
    image = None
    if model.spec.start_image is Use.REQUIRED:
        image = png(np.full((request.height, request.width, 3), 128, np.uint8))
    conditioning = load_encoder(model).encode(request, image)
    denoiser = load_denoiser(model)
    state = denoiser.start(request, conditioning)
    made = denoiser.step(request, conditioning, state)  # warm
    step = measured_peak(lambda: denoiser.step(request, conditioning, state))
    found = [Compared(denoise_footprint(model, request, 1, Dtype.FLOAT32).beside, step)]
    if decodes:
        decoder: Any = load_decoder(model)
        vae = getattr(decoder.vae, "vae", decoder.vae)
        latents = made.latents.numpy()
        lived = peak_bytes(vae, lambda: deque(decoder.decode(request, latents), maxlen=0))
        found.append(Compared(decode_footprint(model, request, Dtype.FLOAT32).beside, lived))
    return found


SMALL: dict[str, tuple[dict[str, Any], ...]] = {
    "z-image-video": (
        {"num_frames": 13, "width": 256, "height": 256},
        {"num_frames": 29, "width": 192, "height": 320, "guidance_scale": 1.0},
        {"num_frames": 29, "width": 320, "height": 320, "f_patch_size": 2},
    ),
    "animatediff": (
        {"num_frames": 8, "width": 256, "height": 256},
        {"num_frames": 16, "width": 192, "height": 256},
        {"num_frames": 12, "width": 320, "height": 192, "guidance_scale": 1.0},
    ),
    "svd": (
        {"num_frames": 14, "width": 256, "height": 256},
        {"num_frames": 8, "width": 320, "height": 192},
        {"num_frames": 14, "width": 192, "height": 192, "guidance_scale": 1.0},
    ),
    "svd-xt": (
        {"num_frames": 25, "width": 256, "height": 192},
        {"num_frames": 12, "width": 256, "height": 256},
        {"num_frames": 25, "width": 128, "height": 128, "guidance_scale": 1.0},
    ),
    "hunyuan-video": (
        {"num_frames": 33, "width": 320, "height": 320},
        {"num_frames": 33, "width": 448, "height": 256},
        {"num_frames": 49, "width": 384, "height": 384, "true_cfg_scale": 1.0},
    ),
}


def print_comparison(models: dict[str, Model]) -> dict[str, float]:
    """The third table; the largest error of each family."""
    print(
        f"{'':34}{'step':>8}{'measured':>10}{'decode':>9}{'measured':>10}   MB beside the weights"
    )
    worst: dict[str, float] = {}
    for family, cases in SMALL.items():
        for fields in cases:
            found = compare(models[family], **fields)
            worst[family] = max(worst.get(family, 0.0), *[abs(each.error) for each in found])
            size = f"{family} {fields['num_frames']}f {fields['width']}x{fields['height']}"
            columns = "".join(
                f"{each.predicted / 1e6:9.2f}{each.measured / 1e6:10.2f}" for each in found
            )
            errors = " ".join(f"{each.error:+.1%}" for each in found)
            print(f"{size:33}{columns}   {errors}", flush=True)
    return {family: round(error, 4) for family, error in worst.items()}


def print_h200(models: dict[str, Model]) -> dict[str, float]:
    """The second table; the error of each family."""
    print(f"{'':34}{'predicted':>10}{'measured':>10}   GB, one step on an H200, bfloat16")
    errors = {}
    for claim, guided, measured in H200:
        model = models[claim.published]
        scale = {} if guided else {"guidance_scale": 1.0}
        found = denoise_footprint(model, request_of(model, claim, **scale), 1, Dtype.BFLOAT16)
        size = f"{claim.published} {claim.num_frames}f {claim.width}x{claim.height}"
        errors[claim.published] = round(found.total / GB / measured - 1, 4)
        print(f"{size:34}{found.total / GB:10.2f}{measured:10.2f}   {errors[claim.published]:+.1%}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__)
    parser.parse_args()
    torch.set_num_threads(2)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name in PUBLISHED:
            (Path(folder) / name).mkdir()
            models[name] = published_model(Path(folder) / name, name)
        largest = print_placements(models)
        on_gpu = print_h200(models)
        (Path(folder) / "small").mkdir()
        small = print_comparison(small_models(Path(folder) / "small"))
    result = {"max_error": small, "h200_error": on_gpu, "hunyuan_720p_129f": largest}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
