"""Laws of the Z-Image video family, on a tiny random checkpoint."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from models.catalog import Model
from models.conditioning import ZImageConditioning
from models.denoise import denoise
from models.request import VideoRequest
from models.spec import WeightsDamaged
from models.stages import load_denoiser
from models.z_image_encoder import ZImageVideoEncoder
from models.z_image_video import ZImageVideoDecoder, ZImageVideoDenoiser

ARequest = Callable[..., VideoRequest]
FloatArray = NDArray[np.float32]


@pytest.fixture(scope="module")
def encoder(model: Model) -> ZImageVideoEncoder:
    return ZImageVideoEncoder(model)


@pytest.fixture(scope="module")
def denoiser(model: Model) -> ZImageVideoDenoiser:
    return ZImageVideoDenoiser(model)


@pytest.fixture(scope="module")
def decoder(model: Model) -> ZImageVideoDecoder:
    return ZImageVideoDecoder(model)


def png(width: int, height: int) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def latents_of(
    denoiser: ZImageVideoDenoiser, request: VideoRequest, conditioning: ZImageConditioning
) -> FloatArray:
    *_, last = denoise(denoiser, request, conditioning)
    return np.asarray(last.latents.numpy())


def test_text_states_equal_those_of_the_upstream_pipeline(
    encoder: ZImageVideoEncoder, a_request: ARequest
) -> None:
    upstream = ZImagePipeline(
        scheduler=None,
        vae=None,
        text_encoder=encoder.text_encoder,
        tokenizer=encoder.tokenizer,
        transformer=None,
    )
    expected = upstream._encode_prompt("a red circle", device=torch.device("cpu"))[0]
    got = encoder.encode(a_request(), None).positive
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_equals_that_of_the_upstream_pipeline_to_the_bit(
    encoder: ZImageVideoEncoder,
    denoiser: ZImageVideoDenoiser,
    a_request: ARequest,
    guidance_scale: float,
) -> None:
    """Given the texts as they are encoded here, without padding, which only rounds otherwise."""
    request = a_request(
        num_frames=1, num_steps=5, guidance_scale=guidance_scale, negative_prompt="blurred"
    )
    upstream = ZImagePipeline(
        scheduler=denoiser.schedules.euler,
        vae=None,
        text_encoder=encoder.text_encoder,
        tokenizer=encoder.tokenizer,
        transformer=denoiser.transformer,
    )
    upstream.set_progress_bar_config(disable=True)
    conditioning = encoder.encode(request, None)
    negative = None
    if conditioning.negative is not None:
        negative = [torch.tensor(conditioning.negative)]
    expected = upstream(
        prompt_embeds=[torch.tensor(conditioning.positive)],
        negative_prompt_embeds=negative,
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=guidance_scale - 1,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images
    got = latents_of(denoiser, request, conditioning)
    np.testing.assert_array_equal(got[:, :, 0], expected.numpy())


def test_long_prompts_are_cut_and_their_length_told(
    encoder: ZImageVideoEncoder, a_request: ARequest
) -> None:
    conditioning = encoder.encode(a_request(prompt="red " * 100), None)
    assert conditioning.num_tokens > 100
    assert len(conditioning.positive) == encoder.model.manifest.max_text_tokens


def test_any_text_can_be_encoded(encoder: ZImageVideoEncoder, a_request: ARequest) -> None:
    assert np.isfinite(encoder.encode(a_request(prompt="猫 Zürich \n 🎬"), None).positive).all()


def test_no_guidance_needs_no_negative_text(
    encoder: ZImageVideoEncoder, a_request: ARequest
) -> None:
    assert encoder.encode(a_request(guidance_scale=1.0), None).negative is None
    assert encoder.encode(a_request(guidance_scale=2.0), None).negative is not None


@pytest.mark.parametrize("f_patch_size", [1, 2, 4])
@pytest.mark.parametrize("num_frames", [1, 13, 14])
def test_a_video_has_the_frames_and_the_size_that_were_asked(
    encoder: ZImageVideoEncoder,
    denoiser: ZImageVideoDenoiser,
    decoder: ZImageVideoDecoder,
    a_request: ARequest,
    f_patch_size: int,
    num_frames: int,
) -> None:
    request = a_request(
        f_patch_size=f_patch_size, num_frames=num_frames, width=34, height=18, num_steps=1
    )
    latents = latents_of(denoiser, request, encoder.encode(request, None))
    chunks = [frames.pixels for frames in decoder.decode(request, latents)]
    assert np.concatenate(chunks).shape == (num_frames, 18, 34, 3)
    assert len(chunks[0]) == 1
    assert all(1 <= len(chunk) <= 4 for chunk in chunks[1:])


def test_the_seed_decides_the_video(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    conditioning = encoder.encode(a_request(), None)
    first = latents_of(denoiser, a_request(seed=1), conditioning)
    np.testing.assert_array_equal(first, latents_of(denoiser, a_request(seed=1), conditioning))
    assert np.abs(first - latents_of(denoiser, a_request(seed=2), conditioning)).max() > 0.1


def test_guidance_of_one_is_the_positive_prediction_alone(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    with_negative = encoder.encode(a_request(guidance_scale=2.0), None)
    alone = replace(with_negative, negative=None)
    one = latents_of(denoiser, a_request(guidance_scale=1.0), with_negative)
    np.testing.assert_allclose(
        one, latents_of(denoiser, a_request(guidance_scale=1.0), alone), atol=1e-5
    )


def test_guidance_extrapolates_away_from_the_negative(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    conditioning = encoder.encode(a_request(guidance_scale=2.0), None)
    assert conditioning.negative is not None
    swapped = replace(conditioning, positive=conditioning.negative, negative=conditioning.positive)
    noise = denoiser.start(a_request(num_steps=1), conditioning)
    # One step over the whole schedule: latents move by the velocity itself.
    positive, negative, guided, mirrored = (
        denoiser.step(a_request(guidance_scale=scale, num_steps=1), told, noise).latents
        for scale, told in ((1, conditioning), (0, conditioning), (3, conditioning), (3, swapped))
    )
    torch.testing.assert_close(guided, negative + 3 * (positive - negative), atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored, positive + 3 * (negative - positive), atol=1e-5, rtol=0)


def test_steps_arrive_one_by_one_and_resume_from_any(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    request = a_request(num_steps=4)
    conditioning = encoder.encode(request, None)
    states = list(denoise(denoiser, request, conditioning))
    assert [state.step for state in states] == [1, 2, 3, 4]
    resumed = denoiser.step(request, conditioning, states[1])
    assert torch.equal(resumed.latents, states[2].latents)


def test_streamed_decoding_is_bit_equal_to_the_whole(
    decoder: ZImageVideoDecoder, a_request: ARequest
) -> None:
    request = a_request(num_frames=13)
    latents = np.random.default_rng(0).standard_normal((1, 8, 4, 8, 8), np.float32)
    with torch.inference_mode():
        vae: Any = decoder.vae
        whole = vae.vae.decode(torch.from_numpy(latents)).sample
    expected = ((whole[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    streams = [decoder.decode(request, latents) for _ in range(2)]
    chunks = list(zip(*streams, strict=True))  # interleaved: each stream has its own cache
    for index in range(2):
        got = np.concatenate([chunk[index].pixels for chunk in chunks])
        np.testing.assert_array_equal(got, expected)


def test_the_start_frame_is_held_through_every_step(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    request = a_request()
    conditioning = encoder.encode(request, png(64, 64))
    assert conditioning.start_latents is not None
    for state in denoise(denoiser, request, conditioning):
        np.testing.assert_array_equal(state.latents[0, :, :1].numpy(), conditioning.start_latents)


def test_the_start_image_is_padded_to_the_generated_size(
    encoder: ZImageVideoEncoder, a_request: ARequest
) -> None:
    conditioning = encoder.encode(a_request(width=50, height=34), png(50, 34))
    assert conditioning.start_latents is not None
    assert conditioning.start_latents.shape == (8, 1, 6, 8)


def test_a_source_video_is_noised_as_far_as_strength_says(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (9, 64, 64, 3), np.uint8)
    request = a_request(num_steps=10)
    conditioning = encoder.encode(request, None, frames)
    assert conditioning.source_latents is not None
    assert conditioning.source_latents.shape == (8, 4, 8, 8)  # 13 frames: the last is repeated
    noise = denoiser.start(request, encoder.encode(request, None)).latents[0].numpy()
    distances = []
    for strength, num_steps in ((1.0, 10), (0.5, 5), (0.01, 1)):
        changed = request.model_copy(update={"strength": strength})
        state = denoiser.start(changed, conditioning)
        assert (state.step, state.num_steps) == (10 - num_steps, 10)
        assert len(list(denoise(denoiser, changed, conditioning))) == num_steps
        distances.append(np.abs(state.latents[0].numpy() - conditioning.source_latents).mean())
        if strength == 1.0:
            np.testing.assert_allclose(state.latents[0].numpy(), noise, atol=1e-6)
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < distances[0] / 2


def test_flow_shift_moves_the_noise_levels(
    encoder: ZImageVideoEncoder, denoiser: ZImageVideoDenoiser, a_request: ARequest
) -> None:
    conditioning = encoder.encode(a_request(), None)

    def last(**fields: Any) -> Any:
        *_, state = denoise(denoiser, a_request(**fields), conditioning)
        return state.latents.numpy()

    as_shipped = float(denoiser.schedules.euler.config.shift)
    np.testing.assert_array_equal(last(), last(flow_shift=as_shipped))
    assert np.abs(last() - last(flow_shift=1.0)).max() > 0


def test_a_checkpoint_without_a_parameter_is_refused(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    source = model.folder / "transformer"
    name = "diffusion_pytorch_model.safetensors"
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / name)
    del tensors["all_final_layer.2-4.linear.weight"]
    save_file(tensors, folder / name)
    with pytest.raises(WeightsDamaged, match="2-4"):
        load_denoiser(replace(model, folder=tmp_path))


def test_f_patch_sizes_are_the_checkpoints_own(model: Model) -> None:
    config = json.loads((model.folder / "transformer" / "config.json").read_text())
    assert list(model.spec.f_patch_sizes) == config["all_f_patch_size"]
