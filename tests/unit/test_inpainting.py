"""Of a video, what a mask leaves black stays; denoising may begin late and end early."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.catalog import Model
from models.denoise import denoise, park, resume
from models.regions import latent_mask
from models.request import InvalidRequest, VideoRequest
from models.stages import load_denoiser, load_encoder
from models.tensors import DenoiseState

ARequest = Callable[..., VideoRequest]
Pixels = NDArray[np.uint8]
NUM_STEPS = 4


def clip(num_frames: int = 5) -> Pixels:
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (num_frames, 64, 64, 3), np.uint8)


def grey(value: int, num_frames: int = 1) -> Pixels:
    return np.full((num_frames, 64, 64, 3), value, np.uint8)


def states_of(
    model: Model, request: VideoRequest, source: Pixels, mask: Pixels | None = None
) -> tuple[Any, list[DenoiseState]]:
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None, source)
    if mask is not None:
        request = request.model_copy(update={"mask": "inputs/x"})
        conditioning = replace(conditioning, mask=encoder.encode_mask(request, mask))
    return conditioning, list(denoise(load_denoiser(model), request, conditioning))


@pytest.fixture
def an_edit(a_request: ARequest) -> ARequest:
    return lambda **fields: a_request(num_frames=5, num_steps=NUM_STEPS, strength=1.0, **fields)


def test_a_latent_is_as_white_as_the_whitest_of_its_pixels(
    model: Model, a_request: ARequest
) -> None:
    request = a_request(num_frames=6)
    mask = grey(0, 6)
    mask[0, 9, 17], mask[3, 0, 0], mask[5, 63, 63] = 255, 51, 255
    found = latent_mask(model.spec, request, mask)
    assert found.shape == (3, 8, 8)  # of 9 generated frames
    expected = np.zeros((3, 8, 8), np.float32)
    expected[0, 1, 2], expected[1, 0, 0], expected[2, 7, 7] = 1, 0.2, 1
    assert np.allclose(found, expected)
    assert (latent_mask(model.spec, request, mask[:1]) == expected[0] * np.ones((3, 1, 1))).all()


def test_black_stays_the_source_and_white_is_made_as_if_all_were(
    model: Model, an_edit: ARequest
) -> None:
    source, mask = clip(), grey(0)
    mask[:, :, 32:] = 255
    told, states = states_of(model, an_edit(), source, mask)
    last = states[-1].latents[0].numpy()
    assert np.array_equal(last[..., :4], told.source_latents[..., :4])
    assert np.abs(last[..., 4:] - told.source_latents[..., 4:]).mean() > 0.1
    _, free = states_of(model, an_edit(), source)
    for value, expected in ((255, free[-1].latents), (0, torch.tensor(told.source_latents)[None])):
        _, whole = states_of(model, an_edit(), source, grey(value))
        assert torch.equal(whole[-1].latents, expected)


def test_the_source_has_as_much_noise_as_the_rest(model: Model, an_edit: ARequest) -> None:
    request = an_edit()
    told, states = states_of(model, request, clip(), grey(0))
    denoiser: Any = load_denoiser(model)
    sigmas = denoiser.schedules.schedule(request, torch.device("cpu")).sigmas
    noise = denoiser.start(request, replace(told, source_latents=None)).latents
    source = torch.tensor(told.source_latents)[None]
    for state in states:
        sigma = sigmas[state.step]
        expected = (1 - sigma) * source + sigma * noise
        assert torch.allclose(state.latents, expected, atol=1e-6)


def test_grey_is_kept_in_the_noisy_steps_and_made_in_the_last_ones(
    model: Model, an_edit: ARequest
) -> None:
    request = an_edit(flow_shift=1.0)  # 0.75, 0.5, 0.25 and 0 of noise after the steps
    _, black = states_of(model, request, clip(), grey(0))
    _, half = states_of(model, request, clip(), grey(140))
    same = [torch.equal(b.latents, h.latents) for b, h in zip(black, half, strict=True)]
    assert same == [True, False, False, False]


def test_a_masked_edit_goes_on_from_any_step_in_the_same_bits(
    model: Model, an_edit: ARequest
) -> None:
    request, mask = an_edit(mask="inputs/x"), grey(0)
    mask[:, :, 32:] = 255
    told, states = states_of(model, request, clip(), mask)
    denoiser = load_denoiser(model)
    for state in states[:-1]:
        again = resume(park(state), torch.device("cpu"))
        while again.step < again.num_steps:
            again = denoiser.step(request, told, again)
        assert torch.equal(again.latents, states[-1].latents)


def test_denoising_ends_early_with_the_noise_that_is_left(
    model: Model, a_request: ARequest
) -> None:
    fields = {"num_frames": 5, "num_steps": NUM_STEPS}
    conditioning = load_encoder(model).encode(a_request(**fields), None)
    whole = list(denoise(load_denoiser(model), a_request(**fields), conditioning))
    half = list(denoise(load_denoiser(model), a_request(**fields, denoising_end=0.5), conditioning))
    assert [state.step for state in half] == [1, 2]
    assert half[-1].num_steps == 2
    assert torch.equal(half[-1].latents, whole[1].latents)
    heun = {**fields, "scheduler": "heun"}
    steps = list(denoise(load_denoiser(model), a_request(**heun), conditioning))
    early = list(denoise(load_denoiser(model), a_request(**heun, denoising_end=0.5), conditioning))
    assert torch.equal(early[-1].latents, steps[1].latents)


def test_denoising_begins_where_it_is_said_as_by_strength(
    model: Model, a_request: ARequest
) -> None:
    fields = {"num_frames": 5, "num_steps": NUM_STEPS}
    _, by_strength = states_of(model, a_request(**fields, strength=0.5), clip())
    _, by_start = states_of(model, a_request(**fields, denoising_start=0.5), clip())
    assert [state.step for state in by_start] == [3, 4]
    assert torch.equal(by_start[-1].latents, by_strength[-1].latents)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"denoising_start": 0.5, "strength": 0.5}, "denoising_start"),
        ({"denoising_start": 0.5, "denoising_end": 0.5}, "denoising_end"),
        ({"denoising_end": 0.2}, "denoising_end"),
        ({"denoising_start": 1.0}, "denoising_start"),
        ({"denoising_end": 1.5}, "denoising_end"),
    ],
)
def test_what_leaves_no_step_is_refused(
    a_request: ARequest, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        a_request(num_steps=NUM_STEPS, **fields)
    assert refused.value.param == param


def test_a_masked_edit_without_its_mask_makes_no_step(model: Model, an_edit: ARequest) -> None:
    with pytest.raises(ValueError, match="the mask"):
        states_of(model, an_edit(mask="inputs/x"), clip())
