"""Control networks lead as diffusers' pipelines have them lead, frame by frame."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.pipelines.z_image.pipeline_z_image_controlnet import ZImageControlNetPipeline
from numpy.typing import NDArray
from PIL import Image

from bench import stock_pipelines
from models.catalog import Model, load_model
from models.control import load_control_net
from models.denoise import denoise
from models.request import ControlKind, InvalidRequest, VideoRequest
from models.spec import WeightsDamaged
from models.stages import load_denoiser, load_encoder
from models.tensors import DenoiseState
from tests.unit.conftest import with_control
from training.random_checkpoint import make_image_vae, write_random_checkpoint
from training.random_controls import (
    write_random_controlnet,
    write_random_z_image_control,
)

Pixels = NDArray[np.uint8]
SIDE = 64


def pictures(num_frames: int, seed: int = 0) -> Pixels:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (num_frames, SIDE, SIDE, 3), np.uint8)


def images(frames: Pixels) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def states_of(
    model: Model, request: VideoRequest, frames: Pixels | None = None, image: bytes | None = None
) -> list[DenoiseState]:
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, image)
    if frames is not None:
        conditioning = replace(conditioning, control=encoder.encode_control(request, frames))
    return list(denoise(load_denoiser(model), request, conditioning))


def latents_of(*given: Any) -> torch.Tensor:
    return states_of(*given)[-1].latents


def ask(model: Model, **fields: Any) -> VideoRequest:
    return model.resolve({"prompt": "a red circle", "seed": 3, "num_steps": 3, **fields})


def led(kind: str = "canny", **fields: Any) -> dict[str, Any]:
    return {"control": {"type": kind, **fields}}


@pytest.mark.parametrize("f_patch_size", [1, 2, 4])
def test_each_token_is_led_by_the_frames_and_the_place_that_it_is_of(
    z_image: Model, f_patch_size: int
) -> None:
    """Against the formula; to give tokens frame by frame has the same shape, and is wrong."""
    frames, height, width = 8, 4, 6
    denoiser: Any = load_denoiser(z_image)
    control = denoiser.controls["union"]
    name = f"2-{f_patch_size}"
    seen: list[torch.Tensor] = []
    control.model.control_all_x_embedder[name].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].clone())
    )
    values = torch.arange(8.0 * frames * height * width).reshape(8, frames, height, width)
    with torch.inference_mode():
        control.samples(
            [torch.zeros(8, frames, height, width)],
            torch.tensor([0.5]),
            [torch.zeros(5, 128)],
            values.numpy(),
            scale=1.0,
            f_patch_size=f_patch_size,
            patch_size=2,
        )
    places = product(range(frames // f_patch_size), range(height // 2), range(width // 2))
    expected = [
        [
            values[c, f * f_patch_size + i, 2 * y + j, 2 * x + k]
            for i, j, k, c in product(range(f_patch_size), range(2), range(2), range(8))
        ]
        for f, y, x in places
    ]
    (tokens,) = seen
    assert torch.equal(tokens[: len(expected)], torch.tensor(expected))
    patches = values.reshape(8, frames, height // 2, 2, width // 2, 2)
    by_frame = patches.permute(1, 2, 4, 3, 5, 0).reshape(len(expected), -1)
    assert torch.equal(tokens[: len(expected)], by_frame) == (f_patch_size == 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("refiner", "spare"), [(None, 0), ("control_noise_refiner", 9), ("control_layers", 9)]
)
def test_a_led_image_equals_that_of_the_upstream_pipeline_to_the_bit(
    checkpoint: Path, tmp_path: Path, refiner: str | None, spare: int, guidance_scale: float
) -> None:
    folder = tmp_path / "image"
    shutil.copytree(checkpoint, folder)
    shutil.rmtree(folder / "vae")
    make_image_vae(8).save_pretrained(folder / "vae")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": {}}))
    net = tmp_path / "union"
    write_random_z_image_control(checkpoint / "transformer", net, refiner=refiner, spare=spare)
    model = with_control(load_model(folder), net, "canny")
    request = ask(
        model, num_frames=1, guidance_scale=guidance_scale, negative_prompt="blurred", **led()
    )
    frames = pictures(1)
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None)
    denoiser: Any = load_denoiser(model)
    upstream = stock_pipelines.prepared(
        ZImageControlNetPipeline(
            scheduler=denoiser.schedules.euler,
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=encoder.text_encoder,
            tokenizer=encoder.tokenizer,
            transformer=denoiser.transformer,
            controlnet=ZImageControlNetModel.from_pretrained(net),
        )
    )
    negative = conditioning.negative
    expected = upstream(
        prompt_embeds=[torch.tensor(conditioning.positive)],
        negative_prompt_embeds=None if negative is None else [torch.tensor(negative)],
        control_image=images(frames)[0],
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        guidance_scale=guidance_scale - 1,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images
    got = latents_of(model, request, frames)
    np.testing.assert_array_equal(got[:, :, 0].numpy(), expected.numpy())
    without = latents_of(model, request.model_copy(update={"control": None}))
    assert not torch.equal(got, without)


def test_every_frame_has_a_say_of_its_own(z_image: Model) -> None:
    request = ask(z_image, num_frames=13, **led())
    frames = pictures(13)
    changed = frames.copy()
    changed[9:] = 255 - changed[9:]
    encoder: Any = load_encoder(z_image)
    before, after = (encoder.encode_control(request, given) for given in (frames, changed))
    differs = np.abs(before - after).max(axis=(0, 2, 3)) > 0
    assert differs.tolist() == [False, False, False, True]
    assert not torch.equal(*(latents_of(z_image, request, x) for x in (frames, changed)))


@pytest.mark.parametrize("family", ["z_image", "animatediff"])
def test_a_scale_of_zero_is_no_control_to_the_bit(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    free = latents_of(model, ask(model, num_frames=5))
    made = [
        latents_of(model, ask(model, num_frames=5, **led(scale=scale)), pictures(5))
        for scale in (0, 1)
    ]
    assert torch.equal(made[0], free)
    assert not torch.equal(made[1], free)


@pytest.mark.parametrize("family", ["z_image", "animatediff"])
def test_control_acts_from_its_start_to_its_end(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)

    def run(**fields: Any) -> list[DenoiseState]:
        asked = ask(model, num_frames=5, num_steps=4, **fields)
        return states_of(model, asked, pictures(5) if fields else None)

    free, late, early, whole = run(), run(**led(start=0.5)), run(**led(end=0.5)), run(**led())
    assert torch.equal(late[1].latents, free[1].latents)
    assert not torch.equal(late[2].latents, free[2].latents)
    assert torch.equal(early[1].latents, whole[1].latents)
    assert not torch.equal(early[2].latents, whole[2].latents)


@pytest.mark.parametrize(
    ("family", "fields", "param", "told"),
    [
        ("z_image", led("pose"), "control", "no control of the type pose: canny, depth"),
        ("z_image", led("cats"), "control.type", "'canny'"),
        ("z_image", led(scale=2.5), "control.scale", "less than or equal to 2"),
        ("z_image", led(start=0.5, end=0.5), "control", "start must be less than end"),
        ("z_image", led("depth", preprocess=True), "control", "only canny is made here"),
        ("z_image", led(frames=[0]), "control", "canny leads every frame"),
        ("animatediff", led("rgb", frames=[0, 5]), "control", "of 0 to 4"),
        ("animatediff", led("rgb", frames=[1, 1]), "control", "in order"),
        ("animatediff", led("rgb", frames=[]), "control.frames", "at least 1"),
    ],
)
def test_what_cannot_lead_is_refused_by_name(
    family: str,
    fields: dict[str, Any],
    param: str,
    told: str,
    request: pytest.FixtureRequest,
) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        ask(request.getfixturevalue(family), num_frames=5, **fields)
    assert refused.value.param == param


def test_a_temporal_patch_that_the_network_has_no_layers_for_is_refused(
    z_image: Model,
) -> None:
    (net,) = z_image.controls
    small = replace(net, config={**net.config, "all_f_patch_size": [1, 2]})
    model = replace(z_image, controls=(small,))
    ask(model, num_frames=5, f_patch_size=2, **led())
    with pytest.raises(InvalidRequest, match="must be one of 1, 2") as refused:
        ask(model, num_frames=5, f_patch_size=4, **led())
    assert refused.value.param == "f_patch_size"


def test_the_publishers_scale_is_the_default(z_image: Model, animatediff: Model) -> None:
    scales = {}
    for model in (z_image, animatediff):
        control = ask(model, num_frames=5, **led()).control
        assert control is not None
        scales[model.id] = control.scale
    assert scales == {"z-image-video": 0.75, "animatediff": 1.0}


def test_a_network_leads_only_models_of_its_kind_and_sizes(
    checkpoint: Path, random_family: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_random_checkpoint(other, dim=128, num_layers=1)
    write_random_z_image_control(other / "transformer", tmp_path / "union")
    union = load_control_net(tmp_path / "union", "union", (ControlKind.CANNY,))
    assert union.fits(load_model(other))
    assert union.misfit(load_model(checkpoint)) == "its dim is 128, z-image-video's 64"
    animatediff = load_model(random_family("animatediff"))
    assert union.misfit(animatediff) == "it is for z-image, and animatediff is sd-1"
    deep = replace(union, config={**union.config, "dim": 64, "n_heads": 2, "n_kv_heads": 2})
    deep.config["control_layers_places"] = [0, 2]
    assert deep.misfit(load_model(checkpoint)) == "it has a say in layer 2 of 1"
    write_random_controlnet(tmp_path / "wide", width=16)
    wide = load_control_net(tmp_path / "wide", "wide", (ControlKind.HED,))
    assert "block_out_channels" in str(wide.misfit(animatediff))


def test_what_is_no_control_network_is_refused(checkpoint: Path) -> None:
    with pytest.raises(WeightsDamaged, match="not a control network"):
        load_control_net(checkpoint, "x", (ControlKind.CANNY,))


@pytest.mark.parametrize("family", ["z_image", "animatediff"])
def test_a_led_request_without_its_pictures_makes_no_step(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    with pytest.raises(ValueError, match="is not in its conditioning"):
        states_of(model, ask(model, num_frames=5, **led()))
