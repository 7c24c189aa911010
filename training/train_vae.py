"""Trains the demo model's causal 3D VAE (`AutoencoderKLWan`) on synthetic clips."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.attributes import score
from training.clips import (
    BACKGROUNDS,
    SIZE,
    Combination,
    all_combinations,
    draw_clip,
    is_held_out,
)
from training.loop import MovingAverage, run_steps

NUM_STEPS = 3000
LEARNING_RATE = 2.5e-3
CROP_PX = 32
KL_WEIGHT = 2e-4
LENGTHS = (5, 9, 13)
# What tells a square from a circle is its corners, a few pixels of a clip: without this, how many
# squares survive the VAE is a matter of the seed.
RIM_WEIGHT, RIM_PX = 4.0, 5


def make_vae() -> AutoencoderKLWan:
    """A small Wan VAE: 8 latent channels, 8x in space (2 of them by patches), 4x in time."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def train_vae(work: Path, seed: int, num_steps: int = NUM_STEPS) -> AutoencoderKLWan:
    """Train from nothing, or from where work/vae.pt stands; returns the averaged weights."""
    torch.manual_seed(seed)
    vae = make_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, (0.9, 0.99), weight_decay=1e-4)
    average = MovingAverage({"vae": vae}, decay=0.998)
    seen = [c for c in all_combinations() if not is_held_out(c)]

    def train_step(step: int) -> dict[str, float]:
        chance = random.Random(f"vae-{seed}-{step}")
        torch.manual_seed(chance.getrandbits(48))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 40, 1.0, (1 - step / num_steps) / 0.5)
        whole = chance.random() < 0.2 + 0.3 * (step > 0.7 * num_steps)
        pixels, alpha = _batch(seen, chance, num_clips=2 if whole else 8, whole=whole)
        posterior = vae.encode(pixels).latent_dist
        error = _decode_unclamped(vae, posterior.sample()) - pixels
        weight = 1.0 + (4.0 if whole else 1.0) * alpha + RIM_WEIGHT * _rim(alpha)
        loss = (weight * (error.abs() + error.square())).mean()
        optimizer.zero_grad(set_to_none=True)
        divergence = posterior.mean.square() + posterior.var - 1.0 - posterior.logvar
        (loss + KL_WEIGHT * 0.5 * divergence.mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        square_error = float(((error.detach() / 2).square() * alpha).sum() / (3 * alpha.sum() + 1))
        return {"loss": loss.item(), "foreground_psnr": -10 * float(np.log10(square_error + 1e-9))}

    parts = {"vae": vae, "optimizer": optimizer, "average": average}
    run_steps("vae", num_steps, parts, train_step, work / "vae.pt")
    average.copy_to_modules()
    return vae.eval()


def reconstruction_scores(vae: AutoencoderKLWan, num_clips: int = 84) -> dict[str, float]:
    """Share of held-out clips whose attributes survive encode and decode, in every frame."""
    random_numbers = np.random.default_rng(7)
    held_out = [c for c in all_combinations() if is_held_out(c)]
    right = np.zeros(3)
    for index in range(num_clips):
        wanted = held_out[index % len(held_out)]
        clip = draw_clip(wanted, list(BACKGROUNDS)[index % 2], random_numbers)
        with torch.no_grad():
            latents = vae.encode(to_model_range(clip.pixels)[None]).latent_dist.mode()
            decoded = vae.decode(latents).sample[0]
        pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        found = score(pixels, wanted.colour, wanted.shape, wanted.motion)
        right += [found.colour, found.shape, found.motion]
    return dict(zip(("colour", "shape", "motion"), (right / num_clips).tolist(), strict=True))


def to_model_range(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in -1..1."""
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def _batch(
    combinations: list[Combination], chance: random.Random, *, num_clips: int, whole: bool
) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] in -1..1 and coverage [B, 1, F, H, W]; crops stay near the shape."""
    random_numbers = np.random.default_rng(chance.getrandbits(48))
    length = chance.choice(LENGTHS)
    pixels, alphas = [], []
    for _ in range(num_clips):
        clip = draw_clip(
            chance.choice(combinations), chance.choice(list(BACKGROUNDS)), random_numbers
        )
        first = chance.randint(0, clip.alpha.shape[0] - length)
        frames = slice(first, first + length)
        rows = columns = slice(0, SIZE)
        if not whole:
            y, x = np.argwhere(clip.alpha[first + length // 2] > 0.5).mean(axis=0)
            rows, columns = (_crop(centre, chance) for centre in (y, x))
        pixels.append(to_model_range(clip.pixels[frames, rows, columns]))
        alphas.append(torch.from_numpy(clip.alpha[frames, rows, columns])[None])
    return torch.stack(pixels), torch.stack(alphas)


def _rim(alpha: Tensor) -> Tensor:
    """How much the coverage [B, 1, F, H, W] changes within RIM_PX, 0..1."""
    size, around = (1, RIM_PX, RIM_PX), (0, RIM_PX // 2, RIM_PX // 2)
    highest = functional.max_pool3d(alpha, size, 1, around)
    lowest: Tensor = -functional.max_pool3d(-alpha, size, 1, around)
    return highest - lowest


def _crop(centre: float, chance: random.Random) -> slice:
    start = round(centre) - CROP_PX // 2 + chance.randint(-10, 10)
    start = min(max(start, 0), SIZE - CROP_PX)
    return slice(start, start + CROP_PX)


def _decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`AutoencoderKLWan._decode` without its clamp, which stops the gradient where saturated."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), vae.config.patch_size)
