"""The demo model's training: honest data, an honest measure, and a run that can be interrupted."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bench.generator import Generator, make_prompts
from models.catalog import add_to_manifest, load_model
from models.weight_files import check_sums
from training.__main__ import save_checkpoint
from training.additions import load_parts, save_control, save_lora
from training.attention import use_fusible_attention
from training.attributes import read_attributes, score
from training.captions import canonical, paraphrase
from training.clips import (
    BACKGROUNDS,
    HUES_DEG,
    MOTIONS,
    SHAPES,
    SIZE,
    TRAVEL_PX,
    Combination,
    all_combinations,
    draw_clip,
    is_held_out,
)
from training.loop import run_steps
from training.text_encoder import make_text_encoder, make_tokenizer
from training.train_control import encode_outlines, outline, train_control
from training.train_denoiser import (
    encode_captions,
    encode_clips,
    predict,
    train_denoiser,
)
from training.train_regions import (
    choose_two_shapes,
    draw_two_shapes,
    encode_halves,
    train_regions,
    two_texts,
)
from training.train_vae import _decode_unclamped, _rim, make_vae, train_vae


def test_a_fixed_fifth_is_held_out_and_every_word_is_in_both_parts() -> None:
    held_out = [c for c in all_combinations() if is_held_out(c)]
    seen = [c for c in all_combinations() if not is_held_out(c)]
    assert len(held_out) == len(all_combinations()) // 5
    for part in (held_out, seen):
        assert {c.colour for c in part} == set(HUES_DEG)
        assert {c.shape for c in part} == set(SHAPES)
        assert {c.motion for c in part} == set(MOTIONS)
    assert TRAVEL_PX >= 0.3 * SIZE


@pytest.mark.long
def test_the_measure_reads_every_true_clip_right() -> None:
    random_numbers = np.random.default_rng(0)
    for combination in all_combinations():
        for background in BACKGROUNDS:
            clip = draw_clip(combination, background, random_numbers)
            found = score(clip.pixels, combination.colour, combination.shape, combination.motion)
            assert found.colour
            assert found.shape
            assert found.motion
            # one grey all clip long: two frames tell it as well as all, which `score` has read
            assert read_attributes(clip.pixels[:2]).background == background


def test_one_wrong_frame_is_a_miss() -> None:
    random_numbers = np.random.default_rng(0)
    right = draw_clip(Combination("red", "circle", "right"), "dark", random_numbers).pixels
    other = draw_clip(Combination("blue", "square", "right"), "dark", random_numbers).pixels
    mixed = right.copy()
    mixed[0] = other[0]
    found = score(mixed, "red", "circle", "right")
    assert (found.colour, found.shape, found.motion) == (False, False, True)


def test_grey_off_hues_and_blobs_are_nothing() -> None:
    clip = draw_clip(Combination("red", "circle", "still"), "dark", np.random.default_rng(0))
    frames = {
        "grey": np.array([128, 128, 128]),
        "between red and orange": np.array([240, 80, 20]),
        "between green and mint": np.array([20, 240, 75]),
        "between mint and cyan": np.array([20, 240, 185]),
    }
    for colour in frames.values():
        pixels = 26 * (1 - clip.alpha[..., None]) + colour * clip.alpha[..., None]
        assert set(read_attributes(pixels.astype(np.uint8)).colours) == {None}
    blob = clip.pixels.copy()
    blob[:, 28:34, 4:60] = blob[:, 32:33, 32:33]
    assert set(read_attributes(blob).shapes) == {None}


@pytest.mark.parametrize("frames", ["reversed", "one jumps", "empty", "frozen"])
def test_a_wrong_track_is_a_miss(frames: str) -> None:
    combination = Combination("red", "circle", "right")
    pixels = draw_clip(combination, "dark", np.random.default_rng(0)).pixels
    wrong = {
        "reversed": pixels[::-1],
        "one jumps": pixels[[0, 1, 2, 12, 4, 5, 6, 7, 8, 9, 10, 11, 12]],
        "empty": np.concatenate([pixels[:-1], np.full_like(pixels[:1], 26)]),
        "frozen": pixels[[6] * 13],
    }[frames]
    assert not score(wrong, "red", "circle", "right").motion


def test_a_caption_names_what_it_is_of() -> None:
    combination = Combination("red", "circle", "left")
    assert canonical(combination) == "a red circle moving left"
    chance = random.Random(0)
    captions = {paraphrase(combination, "dark", chance) for _ in range(300)}
    assert len(captions) > 200
    assert all("red" in caption for caption in captions)
    assert all("left" in caption for caption in captions)
    assert not any("light" in caption or "bright" in caption for caption in captions)
    places = {caption.split()[0] in ("on", "against", "over", "with") for caption in captions}
    assert places == {True, False}


def test_no_caption_is_longer_than_the_model_reads() -> None:
    tokenizer = make_tokenizer(1)
    chance = random.Random(0)
    for combination in all_combinations():
        caption = paraphrase(combination, "light", chance)
        assert len(tokenizer(f"<|im_start|>{caption}<|im_end|>").input_ids) <= 32
    assert tokenizer.decode(tokenizer("Zürich 猫 🎬").input_ids) == "zürich 猫 🎬"


def test_unclamped_decoding_is_the_decoder_without_its_clamp() -> None:
    vae = make_vae().eval()
    latents = 3 * torch.randn(1, 8, 3, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        assert torch.equal(_decode_unclamped(vae, latents).clamp(-1, 1), expected)


class Interrupted(Exception):
    """Somebody pulled the plug."""


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(saved_at: Path, interrupt_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1)

        def step(index: int) -> dict[str, float]:
            if index == interrupt_at:
                raise Interrupted
            torch.manual_seed(index)
            loss = layer(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        run_steps("test", 10, {"layer": layer, "optimizer": optimizer}, step, saved_at)
        return layer.weight.detach()

    whole = train(tmp_path / "whole.pt", None)
    import training.loop

    original = training.loop.SAVE_EVERY_S
    training.loop.SAVE_EVERY_S = 0.0
    try:
        with pytest.raises(Interrupted):
            train(tmp_path / "parts.pt", 6)
    finally:
        training.loop.SAVE_EVERY_S = original
    assert torch.equal(train(tmp_path / "parts.pt", None), whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.long
def test_training_makes_a_checkpoint_that_generates(tmp_path: Path) -> None:
    vae = train_vae(tmp_path, seed=1, num_steps=2)
    clips = encode_clips(vae, 1, tmp_path / "clips.pt", clips_per_caption=1)
    assert not any(is_held_out(combination) for combination in clips.combinations)
    assert clips.latents.mean().abs() < 0.01
    assert (clips.latents.std() - 1).abs() < 0.01
    tokenizer = make_tokenizer(1)
    text_encoder = make_text_encoder(len(tokenizer))
    transformer = train_denoiser(
        clips, tokenizer, text_encoder, tmp_path, seed=1, num_steps=2, finish_steps=1
    )
    text_encoder.eval()
    with torch.no_grad():
        trained = encode_captions(tokenizer, text_encoder, ["a red circle"])[0]
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, vae, tokenizer, text_encoder, transformer)
    before = check_sums(folder)
    parts = load_parts(folder)
    texts = (parts.tokenizer, parts.text_encoder)
    clips = encode_clips(parts.vae, 1, tmp_path / "again.pt", 1, is_trained=True)
    outlines = encode_outlines(parts.vae, clips, 1, tmp_path / "outlines.pt", num_clips=20)
    with pytest.raises(ValueError, match="of other clips"):
        encode_outlines(parts.vae, clips, 2, tmp_path / "others.pt", num_clips=20)
    control = train_control(
        clips, outlines, *texts, parts.transformer, tmp_path, seed=1, num_steps=2
    )
    save_control(folder, control)
    halves = encode_halves(parts.vae, 1, tmp_path / "halves.pt", num_clips=20)
    save_lora(
        folder, train_regions(halves, *texts, parts.transformer, tmp_path, seed=1, num_steps=2)
    )
    add_to_manifest(folder, sha256=check_sums(folder))
    assert before.items() < check_sums(folder).items()
    generator = Generator(folder)
    assert {"control/diffusion_pytorch_model.safetensors", "loras/regions.safetensors"} <= {
        *generator.model.manifest.sha256
    }
    assert generator.model.manifest.sha256 == load_model(folder).manifest.sha256
    request = generator.model.resolve({"prompt": "a red circle"})
    served = generator.encoder.encode(request, None).positive
    np.testing.assert_allclose(served, trained.numpy(), atol=0.05)
    long_prompt = generator.model.resolve({"prompt": "red circle " * 40})
    assert generator.encoder.encode(long_prompt, None).num_tokens > 32
    prompt = make_prompts(True, 1, 1)[0]
    assert generator.make({**prompt.fields, "f_patch_size": 4}).pixels.shape == (13, 64, 64, 3)
    plain = generator.make(prompt.fields).pixels
    region = {"prompt": "a blue circle", "box": [0, 0, 32, 64]}
    with_region = {**prompt.fields, "regions": [region]}
    generator.make(
        {**prompt.fields, "control": {"type": "canny"}}, control=outline(clip_alpha(), chance())
    )
    generator.make({**with_region, "loras": [{"name": "regions"}]})
    # after two steps hardly anything, but something
    lora = load_file(folder / "loras" / "regions.safetensors")
    assert all(up.any() for name, up in lora.items() if ".lora_B." in name)
    net = load_file(folder / "control" / "diffusion_pytorch_model.safetensors")
    assert net["control_layers.0.after_proj.weight"].any()
    assert np.array_equal(generator.make(prompt.fields).pixels, plain)


def chance() -> random.Random:
    return random.Random(0)


def clip_alpha() -> NDArray[np.float32]:
    combination = Combination("red", "square", "right")
    return draw_clip(combination, "dark", np.random.default_rng(0)).alpha


def test_an_outline_is_a_line_about_the_shape() -> None:
    alpha = clip_alpha()
    drawn = [outline(alpha, random.Random(seed)) for seed in range(20)]
    for video in drawn:
        assert video.shape == (*alpha.shape, 3)
        assert set(np.unique(video)) == {0, 255}
        inside = alpha[6] > 0.5
        rows, columns = np.nonzero(video[6, ..., 0])
        found = np.zeros_like(inside)
        found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert (found ^ inside).sum() < 0.4 * inside.sum()
        assert 40 < len(rows) < 140
    assert len({video.tobytes() for video in drawn}) == len(drawn)


def test_each_half_shows_what_its_words_say() -> None:
    for seed in range(12):
        two = choose_two_shapes(random.Random(seed), held_out=True)
        assert is_held_out(two.left)
        assert is_held_out(two.right)
        pixels, alpha = draw_two_shapes(two, seed)
        assert pixels.shape[:3] == alpha.shape == (13, SIZE, 2 * SIZE)
        for half, wanted in zip(np.split(pixels, 2, axis=2), (two.left, two.right), strict=True):
            found = score(half, wanted.colour, wanted.shape, wanted.motion)
            assert found.colour
            assert found.shape
            assert found.motion
        here = two.right if two.region_is_right else two.left
        assert two.captions[1] == canonical(here, two.background)
        assert two.box == ((SIZE if two.region_is_right else 0), 0, SIZE, SIZE)


def test_regions_are_trained_in_the_attention_that_they_are_made_in() -> None:
    """One that is a dense mask, and one that has none."""
    generator = Generator(Path("models/demo"))
    denoiser: Any = generator.denoiser
    two = choose_two_shapes(random.Random(3), held_out=False)
    fields = {
        "prompt": two.captions[0],
        "regions": [{"prompt": two.captions[1], "box": two.box}],
        "guidance_scale": 1.0,
        "width": 2 * SIZE,
        "height": SIZE,
        "seed": 1,
    }
    ours = copy.deepcopy(denoiser.transformer)
    use_fusible_attention(ours)
    for f_patch_size in (1, 4):
        request = generator.model.resolve({**fields, "f_patch_size": f_patch_size})
        told = generator.encoder.encode(request, None)
        state = denoiser.start(request, told)
        velocity = denoiser._velocities(
            [request], [told], [state.latents], [torch.tensor(500.0)], None
        )[0]
        texts, seen = two_texts(
            generator.encoder.tokenizer, generator.encoder.text_encoder, [two, None],
            state.latents, f_patch_size,
        )  # fmt: skip
        assert not seen[0].all()
        assert seen[1].all()
        for masks, is_the_same in ((seen[:1], True), (None, False)):
            for layer in ours.layers[::2]:
                layer.attention.processor.seen = masks
            with torch.no_grad():
                made = predict(
                    ours, texts[:1], [state.latents[0]], torch.tensor([0.5]), f_patch_size
                )
            difference = float((made[0] - velocity[0]).abs().max())
            assert (difference < 1e-4) is is_the_same, difference


def test_the_rim_of_a_shape_is_what_tells_it_from_others() -> None:
    alpha = torch.zeros(1, 1, 2, 16, 16)
    alpha[:, :, 1, 4:12, 4:12] = 1.0
    rim = _rim(alpha)
    assert rim.shape == alpha.shape
    assert not rim[:, :, 0].any()  # nothing of one frame reaches into another
    assert rim[0, 0, 1, 4, 4] == rim[0, 0, 1, 2, 11] == rim[0, 0, 1, 5, 8] == 1.0
    assert rim[0, 0, 1, 8, 8] == rim[0, 0, 1, 0, 0] == rim[0, 0, 1, 1, 4] == 0.0
