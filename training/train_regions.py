"""Trains a LoRA by which the demo model tells regions apart: by itself it makes one shape.

What it sees are frames of twice the width with a shape in each half, each told by words of its own,
in attention that is restricted as `models.regions` restricts it. Both have one colour: the VAE has
seen no clips of two, and makes one of them.
"""

import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from models.catalog import TOKENS_PADDED_TO
from models.conditioning import TextPlaces
from models.regions import restrict
from training.attention import FusibleAttention, use_fusible_attention
from training.captions import canonical
from training.clips import (
    BACKGROUNDS,
    SIZE,
    Combination,
    all_combinations,
    draw_clip,
    is_held_out,
)
from training.encoding import encode_drawn, normalise
from training.loop import MovingAverage, Stateful, run_steps
from training.optimizers import rate_at
from training.train_denoiser import BATCH_SIZES as OF_ONE_SHAPE
from training.train_denoiser import (
    CAPTION_DROPOUT,
    F_PATCH_SHARES,
    FIRST_FRAME_WEIGHT,
    LAYOUT_SHIFT,
    encode_captions,
    flow_matching_loss,
    predict,
)

NUM_STEPS = 1500
NUM_CLIPS = 1200
RANK = 8
LEARNING_RATE = 4e-3
TARGETS = (
    r"(noise_refiner|layers)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"
)
# Twice as many tokens.
BATCH_SIZES = {f_patch_size: size // 2 for f_patch_size, size in OF_ONE_SHAPE.items()}


@dataclass(frozen=True, slots=True)
class TwoShapes:
    """A shape in each half of a wide frame, of one colour; words of a region tell of the one that
    is on the right, or else of the one on the left.
    """

    left: Combination
    right: Combination
    background: str
    region_is_right: bool

    @property
    def captions(self) -> tuple[str, str]:
        """The prompt, and the region's words."""
        first, second = (
            canonical(self.left, self.background),
            canonical(self.right, self.background),
        )
        return (first, second) if self.region_is_right else (second, first)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The region's x, y, width and height in pixels."""
        return SIZE * self.region_is_right, 0, SIZE, SIZE


@dataclass(frozen=True, slots=True)
class LatentHalves:
    """latents [N, C, F, H, W], normalised; coverage [N, 1, F, H, W] in 0..1; what they are of."""

    latents: Tensor
    coverage: Tensor
    told: list[TwoShapes]


def choose_two_shapes(chance: random.Random, *, held_out: bool) -> TwoShapes:
    """Both of the same split, and not the same."""
    split = [c for c in all_combinations() if is_held_out(c) is held_out]
    left = chance.choice(split)
    right = chance.choice([c for c in split if c.colour == left.colour and c != left])
    return TwoShapes(left, right, chance.choice(list(BACKGROUNDS)), chance.random() < 0.5)


def draw_two_shapes(two: TwoShapes, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """uint8 [F, H, 2*W, 3], and the shapes' coverage [F, H, 2*W]."""
    random_numbers = np.random.default_rng(seed)
    clips = [draw_clip(one, two.background, random_numbers) for one in (two.left, two.right)]
    pixels = np.concatenate([clip.pixels for clip in clips], axis=2)
    return pixels, np.concatenate([clip.alpha for clip in clips], axis=2)


def encode_halves(
    vae: AutoencoderKLWan, seed: int, saved_at: Path, num_clips: int = NUM_CLIPS
) -> LatentHalves:
    """Draw and encode pairs of shapes."""
    chance = random.Random(f"halves-{seed}")
    told = [choose_two_shapes(chance, held_out=False) for _ in range(num_clips)]

    def draw(number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        return draw_two_shapes(told[number], seed * 10**6 + number)

    latents, coverage = encode_drawn(vae, draw, num_clips, saved_at, of="halves")
    return LatentHalves(normalise(vae, latents), coverage, told)


def train_regions(
    halves: LatentHalves,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
    work: Path,
    seed: int,
    num_steps: int = NUM_STEPS,
) -> dict[str, Tensor]:
    """Train a LoRA, whose layers the transformer has from then on; its averaged weights, by the
    names that diffusers has for them in a file.
    """
    torch.manual_seed(seed)
    for module in (transformer, text_encoder):
        module.requires_grad_(False).eval()
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), transformer, "regions"
    )
    own = torch.nn.ParameterDict(
        {
            name.replace(".", "/"): weight
            for name, weight in transformer.named_parameters()
            if weight.requires_grad
        }
    )
    use_fusible_attention(transformer)
    restricted: list[FusibleAttention] = [
        layer.attention.processor for layer in transformer.layers[::2]
    ]
    adam = torch.optim.AdamW(own.values(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.0)
    average = MovingAverage({"lora": own}, decay=0.995)

    def train_step(step: int) -> dict[str, float]:
        chance = random.Random(f"regions-{seed}-{step}")
        torch.manual_seed(chance.getrandbits(48))
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATE * rate_at(step, num_steps)
        f_patch_size = chance.choices(list(F_PATCH_SHARES), list(F_PATCH_SHARES.values()))[0]
        rows = chance.choices(range(len(halves.told)), k=BATCH_SIZES[f_patch_size])
        told = [None if chance.random() < CAPTION_DROPOUT else halves.told[row] for row in rows]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            texts, seen = two_texts(tokenizer, text_encoder, told, halves.latents, f_patch_size)
            for processor in restricted:
                processor.seen = seen
            loss = flow_matching_loss(
                partial(predict, transformer, texts),
                halves.latents[rows],
                halves.coverage[rows],
                f_patch_size=f_patch_size,
                sigma_shift=LAYOUT_SHIFT,
                first_frame_weight=FIRST_FRAME_WEIGHT,
            )
            adam.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        adam.step()
        average.update()
        return {f"loss_f{f_patch_size}": loss.item()}

    parts: dict[str, Stateful] = {"lora": own, "adam": adam, "average": average}
    run_steps("regions", num_steps, parts, train_step, work / "regions.pt")
    average.copy_to_modules()
    for processor in restricted:
        processor.seen = None
    return {
        f"transformer.{name.replace('/', '.').replace('.regions', '')}": weight.detach().clone()
        for name, weight in own.items()
    }


@torch.no_grad()
def two_texts(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    told: list[TwoShapes | None],
    latents: Tensor,
    f_patch_size: int,
) -> tuple[list[Tensor], Tensor]:
    """Both texts of each, one after the other, and which tokens see which: bool [B, T, T]."""
    captions: list[str] = []
    for two in told:
        captions += ("", "") if two is None else two.captions
    encoded = encode_captions(tokenizer, text_encoder, captions)
    pairs = list(zip(encoded[::2], encoded[1::2], strict=True))
    texts = [
        first if two is None else torch.cat([first, second])
        for two, (first, second) in zip(told, pairs, strict=True)
    ]
    _, _, frames, height, width = latents.shape
    grid = (frames // f_patch_size, height // 2, width // 2)
    longest = _padded(math.prod(grid)) + max(_padded(len(text)) for text in texts)
    seen = torch.ones(len(told), longest, longest, dtype=torch.bool)
    for mask, two, pair in zip(seen, told, pairs, strict=True):
        if two is not None:
            places = TextPlaces((len(pair[0]), len(pair[1])), _half(two, grid))
            mask[:] = False
            for sight in restrict(places, sum(places.lengths), torch.device("cpu")).sights:
                mask[sight.queries[:, None], sight.keys[None]] = True
            mask[~mask.any(dim=1)] = True  # what pads the shorter texts, which nobody sees
    return texts, seen


def _half(two: TwoShapes, grid: tuple[int, int, int]) -> NDArray[np.bool_]:
    """bool [1, f, h, w]: the tokens of the second words."""
    places = np.zeros((1, *grid), bool)
    middle = grid[2] // 2
    places[0, :, :, slice(middle, None) if two.region_is_right else slice(middle)] = True
    return places


def _padded(count: int) -> int:
    return -(-count // TOKENS_PADDED_TO) * TOKENS_PADDED_TO
