"""ControlNets and SparseCtrl lead AnimateDiff as diffusers' pipelines have them lead."""

from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.pipelines.animatediff import pipeline_animatediff_sparsectrl
from diffusers.pipelines.animatediff.pipeline_animatediff_controlnet import (
    AnimateDiffControlNetPipeline,
)
from diffusers.pipelines.animatediff.pipeline_animatediff_sparsectrl import (
    AnimateDiffSparseControlNetPipeline,
)

from bench import stock_pipelines
from models.catalog import Model
from models.control import ControlNet
from models.request import ControlKind
from models.start_image import decode_png
from tests.unit.test_control import SIDE, ask, images, latents_of, led, pictures
from tests.unit.test_families import png


def stock_controlled(model: Model, pipeline: Any, kind: type[Any], net: ControlNet) -> Any:
    made = stock_pipelines.animatediff(
        model.folder,
        pipeline=lambda **parts: pipeline(**parts, controlnet=kind.from_pretrained(net.folder)),
    )
    return stock_pipelines.prepared(made)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_controlnet_leads_animatediff_as_the_stock_pipeline_to_the_bit(
    animatediff: Model, guidance_scale: float
) -> None:
    frames = pictures(5)
    fields = {"num_frames": 5, "guidance_scale": guidance_scale, "num_steps": 4}
    request = ask(animatediff, negative_prompt="blurred", **fields, **led(scale=0.6, end=0.75))
    net = animatediff.control_net(ControlKind.CANNY)
    pipeline = stock_controlled(animatediff, AnimateDiffControlNetPipeline, ControlNetModel, net)
    expected = pipeline(
        prompt=request.prompt,
        negative_prompt="blurred",
        num_frames=5,
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        conditioning_frames=images(frames),
        controlnet_conditioning_scale=0.6,
        control_guidance_end=0.75,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).frames
    assert torch.equal(latents_of(animatediff, request, frames), expected)


@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_sparse_control_leads_some_frames_as_in_the_stock_pipeline(
    animatediff: Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which draws the pictures' latents from their posterior, of which the mode is taken here, and
    encodes them in another layout of memory, which rounds otherwise.
    """
    monkeypatch.setattr(
        pipeline_animatediff_sparsectrl,
        "retrieve_latents",
        lambda encoded: encoded.latent_dist.mode(),
    )
    frames = pictures(2)
    request = ask(animatediff, num_frames=5, **led(kind, frames=[0, 3]))
    net = animatediff.control_net(ControlKind(kind))
    pipeline = stock_controlled(
        animatediff, AnimateDiffSparseControlNetPipeline, SparseControlNetModel, net
    )
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: encode(pixels.contiguous()))
    expected = pipeline(
        prompt=request.prompt,
        num_frames=5,
        guidance_scale=request.guidance_scale,
        num_inference_steps=3,
        conditioning_frames=images(frames),
        controlnet_frame_indices=[0, 3],
        height=SIDE,
        width=SIDE,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).frames
    got = latents_of(animatediff, request, frames)
    assert torch.equal(got, expected)
    elsewhere = ask(animatediff, num_frames=5, **led(kind, frames=[0, 4]))
    assert not torch.equal(latents_of(animatediff, elsewhere, frames), got)


def test_a_start_image_is_sparse_control_of_the_first_frame(animatediff: Model) -> None:
    image = png(SIDE, SIDE)
    request = ask(animatediff, num_frames=5).model_copy(update={"start_image": "inputs/x"})
    started = latents_of(animatediff, request, None, image)
    frame = decode_png(image)[None]
    same = ask(animatediff, num_frames=5, **led("rgb", frames=[0]))
    assert torch.equal(started, latents_of(animatediff, same, frame))


def test_a_start_image_and_a_control_both_have_a_say(animatediff: Model) -> None:
    image, frames = png(SIDE, SIDE), pictures(5)
    plain = ask(animatediff, num_frames=5)
    led_by_both = ask(animatediff, num_frames=5, **led())
    started = plain.model_copy(update={"start_image": "inputs/x"})
    both = led_by_both.model_copy(update={"start_image": "inputs/x"})
    made = [
        latents_of(animatediff, plain),
        latents_of(animatediff, started, None, image),
        latents_of(animatediff, led_by_both, frames),
        latents_of(animatediff, both, frames, image),
    ]
    assert len({latents.numpy().tobytes() for latents in made}) == 4
