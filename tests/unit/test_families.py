"""The published families, on tiny random checkpoints: each makes what diffusers' pipeline makes."""

import dataclasses
import io
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.animatediff.pipeline_animatediff_video2video import (
    AnimateDiffVideoToVideoPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from numpy.typing import NDArray
from PIL import Image

from bench import stock_pipelines
from models.catalog import Model, load_model
from models.denoise import denoise, park, resume
from models.request import VideoRequest
from models.spec import Use
from models.stages import load_decoder, load_denoiser, load_encoder
from models.tensors import DenoiseState
from training.random_families import RANDOM_FAMILIES

RandomFamily = Callable[[str], Path]
FloatArray = NDArray[np.float32]
FAMILIES = list(RANDOM_FAMILIES)
OF_TOKENS = [name for name in FAMILIES if name.startswith("hunyuan")]


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Made:
    """What the stages made of a request, and what they made it from."""

    model: Model
    request: VideoRequest
    image: Image.Image | None
    conditioning: Any
    states: list[DenoiseState]
    frames: NDArray[np.uint8]

    @property
    def latents(self) -> torch.Tensor:
        return self.states[-1].latents


def make(folder: Path, source_frames: NDArray[np.uint8] | None = None, **fields: Any) -> Made:
    model = load_model(folder)
    request = model.resolve({"prompt": "a red circle moving right", "seed": 3, **fields})
    image = None
    if model.spec.start_image is Use.REQUIRED:
        image = png(request.width, request.height)
    denoiser = load_denoiser(model)
    conditioning = load_encoder(model).encode(request, image, source_frames)
    states = [denoiser.start(request, conditioning), *denoise(denoiser, request, conditioning)]
    latents = states[-1].latents.numpy()
    chunks = [frames.pixels for frames in load_decoder(model).decode(request, latents)]
    opened = None if image is None else Image.open(io.BytesIO(image))
    return Made(model, request, opened, conditioning, states, np.concatenate(chunks))


def stock(pipeline: Any, made: Made, **arguments: Any) -> tuple[torch.Tensor, FloatArray]:
    """The latents and the frames, in 0..255, of diffusers' own pipeline."""
    request = made.request
    arguments = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_steps,
        **arguments,
    }
    if made.image is not None:
        arguments["image"] = made.image
    found = [
        pipeline(
            **arguments,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type=kind,
        ).frames
        for kind in ("latent", "np")
    ]
    return found[0], found[1][0] * 255


def assert_the_same(frames: NDArray[np.uint8], expected: FloatArray) -> None:
    """Rounded, a value that lies half way between two may become either."""
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("scheduler", "stock_scheduler", "num_steps"),
    [
        (None, DDIMScheduler, 3),
        ("ddim", DDIMScheduler, 3),
        ("euler", EulerDiscreteScheduler, 3),
        ("lcm", LCMScheduler, 4),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_animatediff_equals_the_stock_pipeline_to_the_bit(
    random_family: RandomFamily,
    scheduler: str | None,
    stock_scheduler: Any,
    num_steps: int,
    guidance_scale: float,
) -> None:
    folder = random_family("animatediff")
    fields: dict[str, Any] = {
        "num_frames": 6,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
    }
    made = make(folder, scheduler=scheduler, negative_prompt="blurred", **fields)
    pipeline = stock_pipelines.animatediff(folder, stock_scheduler)
    latents, frames = stock(
        pipeline,
        made,
        prompt=made.request.prompt,
        negative_prompt="blurred",
        num_frames=6,
        guidance_scale=guidance_scale,
        decode_chunk_size=4,
    )
    assert torch.equal(made.latents, latents)
    assert_the_same(made.frames, frames)


def test_a_changed_video_begins_as_in_the_stock_pipeline(random_family: RandomFamily) -> None:
    """But from the mode of what the VAE makes of it, and so not from a sample."""
    folder = random_family("animatediff")
    source = np.random.default_rng(1).integers(0, 255, (6, 64, 64, 3), np.uint8)
    made = make(folder, source, num_frames=6, num_steps=5, strength=0.6)
    assert [state.step for state in made.states] == [2, 3, 4, 5]
    pipeline = stock_pipelines.animatediff(folder, pipeline=AnimateDiffVideoToVideoPipeline)
    latents = pipeline(
        latents=made.states[0].latents,
        prompt=made.request.prompt,
        num_inference_steps=5,
        strength=0.6,
        guidance_scale=made.request.guidance_scale,
        output_type="latent",
    ).frames
    assert torch.equal(made.latents, latents)


@pytest.mark.parametrize(
    ("family", "fields", "arguments"),
    [
        ("svd", {}, {}),
        ("svd-xt", {"num_steps": 1}, {}),
        (
            "svd",
            {"fps": 12, "motion_bucket_id": 40, "noise_aug_strength": 0.3},
            {"fps": 12, "motion_bucket_id": 40, "noise_aug_strength": 0.3},
        ),
        ("svd", {"num_frames": 5, "motion_strength": 1}, {"motion_bucket_id": 181}),
        (
            "svd",
            {"num_frames": 5, "guidance_scale": 2.5, "min_guidance_scale": 1.5},
            {"max_guidance_scale": 2.5, "min_guidance_scale": 1.5},
        ),
        ("svd", {"num_frames": 5, "guidance_scale": 1.0}, {"max_guidance_scale": 1.0}),
    ],
)
def test_svd_equals_the_stock_pipeline_to_the_bit(
    random_family: RandomFamily, family: str, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    folder = random_family(family)
    made = make(folder, **fields)
    pipeline = stock_pipelines.svd(folder)
    arguments = {"num_frames": made.request.num_frames, "decode_chunk_size": 5, **arguments}
    latents, frames = stock(pipeline, made, **arguments)
    assert torch.equal(made.latents, latents.transpose(1, 2))
    assert_the_same(made.frames, frames)


@pytest.mark.parametrize("family", OF_TOKENS)
@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_hunyuan_video_equals_the_stock_pipeline(
    random_family: RandomFamily, family: str, true_cfg_scale: float
) -> None:
    """To the bit with the texts as they are trimmed here; with padded ones, as it has them, all
    but rounding.
    """
    folder = random_family(family)
    guided = true_cfg_scale > 1
    fields: dict[str, Any] = {
        "true_cfg_scale": true_cfg_scale,
        "negative_prompt": "blurred" if guided else "",
    }
    made = make(folder, num_frames=21, **fields)
    arguments: dict[str, Any] = {
        "num_frames": made.model.spec.generated_frames(21, 1),
        "guidance_scale": made.request.guidance_scale,
        "true_cfg_scale": true_cfg_scale,
    }
    pipeline = stock_pipelines.hunyuan_video(folder, from_image=made.image is not None)
    padded = {"prompt": made.request.prompt, "negative_prompt": "blurred" if guided else None}
    latents, frames = stock(pipeline, made, **arguments, **padded)
    ours = made.latents[:, :, 1:] if family == "hunyuan-video-concat" else made.latents
    torch.testing.assert_close(ours, latents, atol=5e-6, rtol=0)
    trimmed = embeddings("", made.conditioning.positive)
    if guided:
        trimmed |= embeddings("negative_", made.conditioning.negative)
    latents, frames = stock(pipeline, made, **arguments, **trimmed)
    assert torch.equal(ours, latents)
    assert_the_same(made.frames, frames[:21])


def embeddings(prefix: str, text: Any) -> dict[str, Any]:
    states = torch.tensor(text.states)[None]
    return {
        f"{prefix}prompt_embeds": states,
        f"{prefix}prompt_attention_mask": torch.ones(states.shape[:2]),
        f"{prefix}pooled_prompt_embeds": torch.tensor(text.pooled)[None],
    }


def test_large_frames_are_decoded_in_tiles_as_in_the_stock_vae(random_family: RandomFamily) -> None:
    """17 frames of 320 x 32: more than one run, each of more than one tile."""
    folder = random_family("hunyuan-video")
    model = load_model(folder)
    request = model.resolve({"prompt": "x", "num_frames": 17, "width": 320, "height": 32})
    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 4, 40), np.float32)
    decoder: Any = load_decoder(model)
    with torch.inference_mode():
        scaled = torch.tensor(latents) / decoder.vae.config.scaling_factor
        whole = decoder.vae.decode(scaled).sample[0]
        assert whole.shape == (3, 17, 32, 320)
    frames = np.concatenate([chunk.pixels for chunk in decoder.decode(request, latents)])
    assert_the_same(frames, ((whole + 1) * 127.5).clamp(0, 255).permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_has_the_frames_and_the_size_that_were_asked(
    random_family: RandomFamily, family: str
) -> None:
    made = make(random_family(family), num_frames=6, width=50, height=34, num_steps=1)
    assert made.frames.shape == (6, 34, 50, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_made_again_from_its_seed_and_from_any_of_its_steps(
    random_family: RandomFamily, family: str
) -> None:
    folder = random_family(family)
    # LCM draws noise at every step
    fields: dict[str, Any] = {"scheduler": "lcm"} if family == "animatediff" else {}
    first = make(folder, num_frames=5, num_steps=3, **fields)
    again = make(folder, num_frames=5, num_steps=3, **fields)
    assert torch.equal(first.latents, again.latents)
    other = make(folder, num_frames=5, num_steps=3, seed=4, **fields)
    assert (first.latents - other.latents).abs().max() > 1e-3
    denoiser = load_denoiser(first.model)
    resumed = resume(park(first.states[1]), torch.device("cpu"))
    while resumed.step < resumed.num_steps:
        resumed = denoiser.step(first.request, first.conditioning, resumed)
    assert torch.equal(resumed.latents, first.latents)
    assert torch.equal(resumed.generator, first.states[-1].generator)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("svd")])
def test_the_words_matter(random_family: RandomFamily, family: str) -> None:
    folder = random_family(family)
    one, other = (
        make(folder, prompt=prompt, num_frames=5).latents
        for prompt in ("a red circle moving right", "a blue box")
    )
    assert (one - other).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["svd", "hunyuan-video-concat", "hunyuan-video-replace"])
def test_the_start_image_matters(random_family: RandomFamily, family: str) -> None:
    model = load_model(random_family(family))
    request = model.resolve({"prompt": "x", "seed": 3, "num_frames": 5, "num_steps": 1})
    encoder, denoiser = load_encoder(model), load_denoiser(model)
    found = []
    for color in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(buffer, "PNG")
        conditioning = encoder.encode(request, buffer.getvalue())
        found.append(list(denoise(denoiser, request, conditioning))[-1].latents)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_whole_motion_unet_serves_like_its_parts(
    random_family: RandomFamily, tmp_path: Path
) -> None:
    """As `AnimateDiffPipeline.save_pretrained` writes it, with the adapter's settings inside."""
    folder = random_family("animatediff")
    joined = tmp_path / "joined"
    shutil.copytree(folder, joined)
    unet = stock_pipelines.animatediff(folder).unet
    for part in ("unet", "motion_adapter"):
        shutil.rmtree(joined / part)
    unet.save_pretrained(joined / "unet")
    fields: dict[str, Any] = {"num_frames": 5, "num_steps": 1}
    assert torch.equal(make(folder, **fields).latents, make(joined, **fields).latents)


@pytest.mark.parametrize("name", ["animatediff", "hunyuan-video", "hunyuan-video-concat"])
def test_texts_of_several_threads_are_each_encoded_as_if_alone(
    random_family: RandomFamily, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(random_family(name))
    encoder: Any = load_encoder(model)
    image = png(32, 32) if model.spec.start_image is Use.REQUIRED else None
    texts = [" ".join(["x"] * (1 + i % 5)) for i in range(12)]
    requests = [model.resolve({"prompt": text, "seed": 1}) for text in texts]
    tokenizer = encoder.pipeline.tokenizer
    changed = tokenizer.set_truncation_and_padding

    def change(**ways: Any) -> None:
        changed(**ways)
        time.sleep(0.001)  # the moment at which another thread's call would change it again

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", change)

    def encode(request: VideoRequest) -> tuple[FloatArray, int]:
        conditioning = encoder.encode(request, image)
        positive = conditioning.positive
        return getattr(positive, "states", positive), conditioning.num_tokens

    alone = [encode(request) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(encode, requests))
    assert [count for _, count in together] == [count for _, count in alone]
    for (found, _), (expected, _) in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
