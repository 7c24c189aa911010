"""The shipped model does what its card says; `bench.prompt_adherence` has the full figures."""

import random
from pathlib import Path

import pytest
import torch

from bench import adherence_modes as modes
from bench.generator import Generator, make_prompts
from bench.prompt_adherence import contact_sheet, measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.set_num_threads(2)
    return Generator(ROOT / "models" / "demo")


@pytest.mark.parametrize("f_patch_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_held_out_prompts_are_followed_in_every_frame(
    generator: Generator, f_patch_size: int
) -> None:
    prompts = make_prompts(True, 12, seed=2)
    shares, videos, scores = measure(generator, prompts, f_patch_size, from_image=False)
    assert shares["colour"] >= 0.9
    assert shares["motion"] >= 0.9
    assert shares["shape"] >= 0.6
    assert contact_sheet(videos, scores).size[0] > 700


def test_a_start_image_is_continued(generator: Generator) -> None:
    shares, _, _ = measure(generator, make_prompts(True, 8, seed=3), 1, from_image=True)
    assert shares["colour"] >= 0.9
    assert shares["motion"] >= 0.9


@pytest.mark.long
def test_outlines_lead_where_the_words_tell_of_the_colour_alone(generator: Generator) -> None:
    prompts = make_prompts(True, 8, seed=4)
    led = modes.control(generator, prompts, random.Random(1)).shares
    alone = modes.control(generator, prompts, random.Random(1), scale=0.0).shares
    assert min(led["colour"], led["motion"], led["overlap"]) >= 0.8
    assert max(alone["motion"], alone["overlap"]) <= 0.3


@pytest.mark.long
def test_a_remix_has_the_new_words_and_an_extension_goes_on(generator: Generator) -> None:
    prompts = make_prompts(True, 8, seed=4)
    for mode in (modes.remix, modes.extension):
        assert min(mode(generator, prompts, random.Random(1)).shares.values()) >= 0.7


@pytest.mark.long
def test_each_half_of_a_frame_shows_what_its_words_say(generator: Generator) -> None:
    made = modes.regions(generator, 6).shares
    assert min(made["colour"], made["motion"]) >= 0.8
    assert modes.regions(generator, 6, told=modes.exchanged).shares["motion"] <= 0.2
    assert modes.regions(generator, 6, with_lora=False).shares["motion"] <= 0.2


def test_the_words_decide(generator: Generator) -> None:
    """Asked for something else, the same measure sees misses: it can fail."""
    prompts = make_prompts(True, 6, seed=2)
    shuffled = [
        type(prompt)(prompt.text, other.combination, prompt.background, prompt.seed)
        for prompt, other in zip(prompts, prompts[1:] + prompts[:1], strict=True)
    ]
    shares, _, _ = measure(generator, shuffled, 1, from_image=False)
    assert max(shares.values()) < 0.9
