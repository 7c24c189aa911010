"""Trains the demo model's `ZImageTransformer2DModel` and text encoder together by flow matching."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from training.attention import use_fusible_attention
from training.captions import canonical, paraphrase
from training.clips import BACKGROUNDS, Combination, all_combinations, draw_clip, is_held_out
from training.encoding import encode_drawn, normalise
from training.loop import MovingAverage, run_steps
from training.optimizers import MuonAndAdam, rate_at

NUM_STEPS, FINISH_STEPS = 6400, 800
CLIPS_PER_CAPTION = 20
BATCH_SIZES = {1: 32, 2: 48, 4: 48}  # by f_patch_size; about as many tokens each
CAPTION_DROPOUT = 0.1
START_FRAME_SHARE = 0.15
FOREGROUND_WEIGHT = 4.0
# The first frame is a latent frame of its own, and what it shows the least certain: the last steps,
# at a low rate, mend the shapes there.
FIRST_FRAME_WEIGHT, FINISH_FIRST_FRAME_WEIGHT, FINISH_RATE = 1.5, 5.0, 0.2
# Noise levels lean to the noisy end, where layout and motion are decided, and later less so, for
# the shapes' corners.
LAYOUT_SHARE, LAYOUT_SHIFT, DETAIL_SHIFT, SHIFTED_SHARE = 0.62, 5.0, 3.0, 0.7
F_PATCH_SHARES = {1: 0.38, 2: 0.3, 4: 0.32}
MAX_TEXT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class LatentClips:
    """Encoded clips: latents [N, C, F, H, W], normalised; coverage [N, 1, F, H, W] in 0..1."""

    latents: Tensor
    coverage: Tensor
    combinations: list[Combination]
    backgrounds: list[str]


def make_transformer() -> ZImageTransformer2DModel:
    """A small Z-Image transformer that takes temporal patches of 1, 2 and 4 latent frames.

    A token of four latent frames carries 128 numbers of noise through the layers, so they must be
    a good deal wider than that.
    """
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2, 2, 2),
        all_f_patch_size=(1, 2, 4),
        in_channels=8,
        dim=192,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=128,
        rope_theta=256.0,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 64, 64],
    )
    for final in transformer.all_final_layer.values():
        torch.nn.init.zeros_(final.linear.weight)
        torch.nn.init.zeros_(final.linear.bias)
    return transformer


def encode_clips(
    vae: AutoencoderKLWan,
    seed: int,
    saved_at: Path,
    clips_per_caption: int = CLIPS_PER_CAPTION,
    *,
    is_trained: bool = False,
) -> LatentClips:
    """Draw and encode every seen combination, and set the VAE's latent mean and deviation, unless
    it is one that others are trained for.
    """
    captions = [
        (combination, background)
        for combination in all_combinations()
        if not is_held_out(combination)
        for background in BACKGROUNDS
    ] * clips_per_caption
    random_numbers = np.random.default_rng(seed)

    def draw(number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        clip = draw_clip(*captions[number], random_numbers)
        return clip.pixels, clip.alpha

    latents, coverage = encode_drawn(vae, draw, len(captions), saved_at, of="clips")
    if not is_trained:
        mean, deviation = (each(dim=(0, 2, 3, 4)) for each in (latents.mean, latents.std))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return LatentClips(
        normalise(vae, latents),
        coverage,
        [combination for combination, _ in captions],
        [background for _, background in captions],
    )


def train_denoiser(
    clips: LatentClips,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    work: Path,
    seed: int,
    num_steps: int = NUM_STEPS,
    finish_steps: int = FINISH_STEPS,
    *,
    compile_blocks: bool = False,
) -> ZImageTransformer2DModel:
    """Train both networks; they return with their averaged weights.

    compile_blocks needs a C++ compiler and a minute or two, which faster steps pay back.
    """
    torch.manual_seed(seed)
    transformer = make_transformer()
    use_fusible_attention(transformer)
    if compile_blocks:
        transformer.compile_repeated_blocks(dynamic=False)
    modules: dict[str, torch.nn.Module] = {
        "transformer": transformer.train(),
        "text_encoder": text_encoder.train(),
    }
    optimizers = MuonAndAdam(modules.values())
    average = MovingAverage(modules, decay=0.998)

    def train_step(step: int) -> dict[str, float]:
        chance = random.Random(f"denoiser-{seed}-{step}")
        torch.manual_seed(chance.getrandbits(48))
        is_finish = step >= num_steps
        rate = rate_at(step, num_steps)
        if is_finish:
            rate = FINISH_RATE * (1 - (step - num_steps) / finish_steps)
        f_patch_size = chance.choices(list(F_PATCH_SHARES), list(F_PATCH_SHARES.values()))[0]
        rows = chance.choices(range(len(clips.combinations)), k=BATCH_SIZES[f_patch_size])
        captions = [
            _caption(clips.combinations[row], clips.backgrounds[row], chance) for row in rows
        ]
        # The text encoder's backward, too, is faster with the plain formula than with flash's.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            texts = encode_captions(tokenizer, text_encoder, captions)
            loss = flow_matching_loss(
                partial(predict, transformer, texts),
                clips.latents[rows],
                clips.coverage[rows],
                f_patch_size=f_patch_size,
                sigma_shift=LAYOUT_SHIFT if step < LAYOUT_SHARE * num_steps else DETAIL_SHIFT,
                first_frame_weight=FINISH_FIRST_FRAME_WEIGHT if is_finish else FIRST_FRAME_WEIGHT,
            )
            optimizers.back(loss)
        optimizers.step(rate)
        average.update()
        return {f"loss_f{f_patch_size}": loss.item()}

    run_steps(
        "denoiser",
        num_steps + finish_steps,
        {**modules, **optimizers.parts, "average": average},
        train_step,
        work / "denoiser.pt",
    )
    average.copy_to_modules()
    return transformer.eval()


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, text_encoder: Qwen3Model, captions: list[str]
) -> list[Tensor]:
    """One [tokens, hidden] tensor a caption, its padding dropped, as Z-Image's pipeline does."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True
        )
        for caption in captions
    ]
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
    )
    hidden = text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
    ).hidden_states[-2]
    return [row[mask.bool()] for row, mask in zip(hidden, tokens.attention_mask, strict=True)]


def _caption(combination: Combination, background: str, chance: random.Random) -> str:
    if chance.random() < CAPTION_DROPOUT:
        return ""
    if chance.random() < 0.6:
        return paraphrase(combination, background, chance)
    return canonical(combination, chance.choice((background, None)))


def flow_matching_loss(
    predicted_by: Callable[[list[Tensor], Tensor, int], list[Tensor]],
    latents: Tensor,
    coverage: Tensor,
    *,
    f_patch_size: int,
    sigma_shift: float,
    first_frame_weight: float,
) -> Tensor:
    """Weighted squared error of the velocity x0 - noise at one random noise level a clip.

    A share of the clips keeps its first latent frame clean, whose loss then does not count: that
    is how the model learns to go on from a start frame. predicted_by: the velocities of noisy
    latents, at times 0..1, with a temporal patch size.
    """
    count = len(latents)
    sigma = torch.rand(count)
    shifted = sigma_shift * sigma / (1 + (sigma_shift - 1) * sigma)
    sigma = torch.where(torch.rand(count) < SHIFTED_SHARE, shifted, sigma).view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    weight = 1 + FOREGROUND_WEIGHT * coverage
    weight[:, :, 0] *= first_frame_weight
    has_start_frame = torch.rand(count) < START_FRAME_SHARE
    noisy[has_start_frame, :, 0] = latents[has_start_frame, :, 0]
    weight[has_start_frame, :, 0] = 0.0
    output = predicted_by(list(noisy.unbind()), 1 - sigma.flatten(), f_patch_size)
    error = torch.stack(output).float() - (latents - noise)
    return (weight * error.square()).mean()


def predict(
    transformer: ZImageTransformer2DModel,
    texts: list[Tensor],
    latents: list[Tensor],
    times: Tensor,
    f_patch_size: int,
) -> list[Tensor]:
    """The velocities [C, F, H, W] of latents at times 0..1."""
    made: list[Tensor] = transformer(
        latents, times, texts, patch_size=2, f_patch_size=f_patch_size, return_dict=False
    )[0]
    return made
