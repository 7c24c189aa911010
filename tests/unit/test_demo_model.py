"""The shipped model does what its card says; `bench.prompt_adherence` has the full figures."""

from pathlib import Path

import pytest
import torch

from bench.prompt_adherence import Generator, contact_sheet, make_prompts, measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.set_num_threads(2)
    return Generator(ROOT / "models" / "demo")


@pytest.mark.parametrize("f_patch_size", [1, 2])
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


def test_the_words_decide(generator: Generator) -> None:
    """Asked for something else, the same measure sees misses: it can fail."""
    prompts = make_prompts(True, 6, seed=2)
    shuffled = [
        type(prompt)(prompt.text, other.combination, prompt.background, prompt.seed)
        for prompt, other in zip(prompts, prompts[1:] + prompts[:1], strict=True)
    ]
    shares, _, _ = measure(generator, shuffled, 1, from_image=False)
    assert max(shares.values()) < 0.9
