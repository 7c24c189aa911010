"""Words have their say where they are given one, by Z-Image's own tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.catalog import Model
from models.conditioning import TextPlaces
from models.denoise import denoise
from models.masks import read_masks, write_masks
from models.regions import restrict, token_places
from models.request import InvalidRequest, SeedVariance, VideoRequest
from models.seed_variance import vary
from models.stages import load_denoiser, load_encoder

ARequest = Callable[..., VideoRequest]
LEFT, RIGHT = [0, 0, 32, 64], [32, 0, 32, 64]


def regions(*given: dict[str, Any]) -> dict[str, Any]:
    return {"regions": [{"prompt": f"text {n}", **region} for n, region in enumerate(given)]}


def latents(
    model: Model, request: VideoRequest, masks: NDArray[np.bool_] | None = None
) -> torch.Tensor:
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None, region_masks=masks)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    return last.latents


def places_of(
    model: Model, request: VideoRequest, masks: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    return token_places(model.spec, request, masks, 2)


def test_a_box_has_the_tokens_whose_middle_is_in_it(model: Model, a_request: ARequest) -> None:
    request = a_request(num_frames=5, **regions({"box": LEFT}, {"box": [16, 16, 16, 48]}))
    places = places_of(model, request)
    assert places.shape == (2, 2, 4, 4)
    assert places[0, 0].tolist() == [[True, True, False, False]] * 4
    assert np.flatnonzero(places[1, 0]).tolist() == [5, 9, 13]
    assert (places[:, 0] == places[:, 1]).all()


def test_what_is_generated_beyond_the_asked_size_belongs_to_its_edge(
    model: Model, a_request: ARequest
) -> None:
    """60 pixels of 64, two of which are cut from each side."""
    request = a_request(num_frames=1, width=60, height=60, **regions({"box": [0, 0, 7, 60]}))
    assert places_of(model, request)[0, 0].tolist() == [[True, False, False, False]] * 4


@pytest.mark.parametrize(
    ("f_patch_size", "num_frames", "frames", "tokens"),
    [
        (1, 13, [0, 0], [True, False, False, False]),
        (1, 13, [4, 5], [False, True, True, False]),
        (1, 13, [12, 12], [False, False, False, True]),
        (1, 12, [11, 11], [False, False, False, True]),
        (2, 13, [5, 8], [False, True]),
        (4, 13, [6, 6], [True]),
    ],
)
def test_a_run_of_frames_has_the_tokens_that_are_of_one_of_them(
    model: Model,
    a_request: ARequest,
    f_patch_size: int,
    num_frames: int,
    frames: list[int],
    tokens: list[bool],
) -> None:
    request = a_request(
        num_frames=num_frames, f_patch_size=f_patch_size, **regions({"frames": frames})
    )
    assert places_of(model, request)[0, :, 0, 0].tolist() == tokens


def test_masks_may_be_of_every_frame(model: Model, a_request: ARequest) -> None:
    request = a_request(num_frames=5, **regions({"box": LEFT}, {"has_mask": True}))
    mask = np.zeros((5, 64, 64), bool)
    mask[0, :32], mask[1:, 32:] = True, True
    masks = read_masks(write_masks([mask]))
    assert (masks == mask[None]).all()
    places = places_of(model, request, masks)
    assert places[1, 0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert places[1, 1].tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    still = read_masks(write_masks([mask[:1]]))
    assert (places_of(model, request, still)[1] == places[1, 0]).all()


def as_dense(restriction: Any, length: int) -> torch.Tensor:
    mask = torch.zeros(length, length, dtype=torch.bool)
    for sight in restriction.sights:
        mask[sight.queries[:, None], sight.keys[None]] = True
    return mask


def test_a_text_sees_itself_and_its_part_of_the_image_alone() -> None:
    tokens = np.zeros((1, 1, 6, 6), bool)
    tokens[0, 0, :, :3] = True
    sees = as_dense(restrict(TextPlaces((9, 5), tokens), 14, torch.device("cpu")), 64 + 32)
    inside = np.flatnonzero(tokens)
    outside = np.concatenate([np.flatnonzero(~tokens[0]), np.arange(36, 64)])
    first, second = np.r_[64:73, 78:96], np.arange(73, 78)  # the padding goes with the first
    assert sees[:64, :64].all()
    for seen, blind, text, other in (
        (inside, outside, second, first),
        (outside, inside, first, second),
    ):
        assert sees[np.ix_(seen, text)].all()
        assert sees[np.ix_(text, seen)].all()
        assert sees[np.ix_(text, text)].all()
        assert not sees[np.ix_(text, other)].any()
        assert not sees[np.ix_(text, blind)].any()
        assert not sees[np.ix_(blind, text)].any()


@pytest.mark.parametrize("f_patch_size", [1, 2])
def test_a_step_is_that_of_a_mask_of_all_pairs_in_every_other_layer(
    model: Model, a_request: ARequest, f_patch_size: int
) -> None:
    request = a_request(
        num_frames=5,
        num_steps=1,
        guidance_scale=1.0,
        f_patch_size=f_patch_size,
        **regions({"box": LEFT}, {"box": [16, 0, 32, 64], "frames": [0, 0]}),
    )
    conditioning: Any = load_encoder(model).encode(request, None)
    denoiser: Any = load_denoiser(model)
    (found,) = denoise(denoiser, request, conditioning)
    plain = replace(conditioning, places=None)
    (free,) = denoise(denoiser, request, plain)
    num_text = len(conditioning.positive)
    restriction = restrict(conditioning.places, num_text, torch.device("cpu"))
    num_image = conditioning.places.tokens[0].size
    length = -(-num_image // 32) * 32 + -(-num_text // 32) * 32
    dense = as_dense(restriction, length)[None, None]
    for block in denoiser.transformer.layers[::2]:
        processor = block.attention.processor
        stock = processor.stock
        processor.stock = lambda attn, hidden, encoder, _mask, rotary, stock=stock: stock(
            attn, hidden, encoder, dense, rotary
        )
    (expected,) = denoise(denoiser, request, plain)
    assert (found.latents - expected.latents).abs().max() < 1e-5
    assert (found.latents - free.latents).abs().max() > 1e-3


def test_the_same_words_everywhere_are_not_the_same_as_none(
    model: Model, a_request: ARequest
) -> None:
    """A region changes what is made; the negative text stays whole."""
    request = a_request(num_frames=5, guidance_scale=3.0, **regions({"box": LEFT}))
    moved = a_request(num_frames=5, guidance_scale=3.0, **regions({"box": RIGHT}))
    free = a_request(num_frames=5, guidance_scale=3.0)
    made = [latents(model, asked) for asked in (request, moved, free)]
    assert len({one.numpy().tobytes() for one in made}) == 3


def test_several_texts_share_the_positions(model: Model, a_request: ARequest) -> None:
    one = a_request(num_frames=5)
    three = a_request(num_frames=5, **regions({"box": LEFT}, {"box": RIGHT}))
    assert model.max_text_tokens(one) == model.manifest.max_text_tokens
    # 128 positions, one of them for the text's beginning, two for the frames
    assert model.max_text_tokens(three) == 96 // 3
    encoder: Any = load_encoder(model)
    long = three.model_copy(update={"prompt": "red " * 60})
    conditioning = encoder.encode(long, None)
    assert conditioning.places.lengths[0] == 32
    assert conditioning.num_tokens > 60


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (regions({}), "a mask, a box or frames"),
        (regions({"box": [40, 0, 32, 64]}), "within 64x64"),
        (regions({"box": [0, 0, 0, 64]}), "within 64x64"),
        (regions({"frames": [3, 5]}), "of 0 to 4"),
        (regions({"frames": [2, 1]}), "a first and a last"),
        (regions(*({"box": LEFT} for _ in range(4))), "no room for so many texts"),
    ],
)
def test_a_region_that_is_none_is_refused(
    a_request: ARequest, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        a_request(num_frames=5, **fields)
    assert refused.value.param == "regions"


def test_no_variance_is_none_to_the_bit(model: Model, a_request: ARequest) -> None:
    states = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    assert np.array_equal(vary(states, SeedVariance(strength=0), 7), states)
    none = latents(model, a_request(num_frames=5))
    still = a_request(num_frames=5, seed_variance={"strength": 0})
    assert torch.equal(latents(model, still), none)
    varied = a_request(num_frames=5, seed_variance={"strength": 0.5})
    assert not torch.equal(latents(model, varied), none)
    assert torch.equal(latents(model, varied), latents(model, varied))


@pytest.mark.parametrize("percent", [1, 30, 100])
def test_variance_is_of_a_share_of_the_states_and_in_their_deviations(percent: float) -> None:
    states = 3 * np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    change = vary(states, SeedVariance(strength=0.2, percent=percent), 7) - states
    assert abs(np.mean(change != 0) - percent / 100) < 0.02
    assert 0.9 * 0.6 < np.abs(change).max() < 1.05 * 0.6
    other = vary(states, SeedVariance(strength=0.2, percent=percent), 8) - states
    assert not np.array_equal(change, other)


def test_each_frames_words_may_vary_by_a_seed_of_their_own(
    model: Model, a_request: ARequest
) -> None:
    variance = {"strength": 0.5, "per_frame": True}
    request = a_request(num_frames=5, seed_variance=variance)
    encoder: Any = load_encoder(model)
    conditioning = encoder.encode(request, None)
    first, second = conditioning.places.lengths
    assert first == second
    assert conditioning.places.tokens[0, :, 0, 0].tolist() == [False, True]
    assert not np.array_equal(conditioning.positive[:first], conditioning.positive[first:])
    of_all = a_request(num_frames=5, seed_variance={**variance, "per_frame": False})
    assert not torch.equal(latents(model, request), latents(model, of_all))
    with pytest.raises(InvalidRequest, match="goes with no regions"):
        a_request(num_frames=5, seed_variance=variance, **regions({"box": LEFT}))
    with pytest.raises(InvalidRequest, match="no room") as refused:
        a_request(num_frames=29, seed_variance=variance)
    assert refused.value.param == "seed_variance"
