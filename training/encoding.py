"""Clips as the VAE sees them, encoded once and kept for the runs that go on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.train_vae import to_model_range

ENCODE_BATCH = 20
# The pixels uint8 [F, H, W, 3] of a clip by its number, and the shapes' coverage [F, H, W].
Draw = Callable[[int], tuple[NDArray[np.uint8], NDArray[np.float32]]]


@torch.no_grad()
def encode_drawn(
    vae: AutoencoderKLWan, draw: Draw, count: int, saved_at: Path, *, of: str
) -> tuple[Tensor, Tensor]:
    """Latents [N, C, F, H, W] as they come from the VAE, and coverage [N, 1, F, H, W] in 0..1.

    draw is asked for each number in order, or for none, if they are there from a run before.
    """
    if not saved_at.exists():
        latents: list[Tensor] = []
        coverage: list[Tensor] = []
        numbers = range(count)
        bar = tqdm(range(0, count, ENCODE_BATCH), desc=f"encode {of}", mininterval=2.0)
        for first in bar:
            drawn = [draw(number) for number in numbers[first : first + ENCODE_BATCH]]
            pixels = torch.stack([to_model_range(video) for video, _ in drawn])
            latents.extend(vae.encode(pixels).latent_dist.mode())
            coverage.extend(_latent_coverage(torch.from_numpy(alpha)) for _, alpha in drawn)
        partial = saved_at.with_suffix(".partial")
        torch.save({"latents": torch.stack(latents), "coverage": torch.stack(coverage)}, partial)
        partial.replace(saved_at)
    saved = torch.load(saved_at, weights_only=True)
    return saved["latents"], saved["coverage"]


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [N, C, F, H, W] of the VAE by its own mean and deviation."""
    shape = (1, -1, 1, 1, 1)
    mean, deviation = (
        torch.tensor(values).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / deviation


def _latent_coverage(alpha: Tensor) -> Tensor:
    """alpha [F, H, W] -> [1, (F-1)/4+1, H/8, W/8]: the most covered pixel of each latent cell."""
    padded = torch.cat([alpha[:1].expand(3, -1, -1), alpha])
    return torch.nn.functional.max_pool3d(padded[None], kernel_size=(4, 8, 8))
