"""Fits the VAE's decoder to what the denoiser really gives it.

The denoiser's latents are a little off the encoder's, and the untouched decoder shows that as soft
corners. Here it sees latents that the denoiser restored from noise, with the true clip as target;
the encoder, and so the latent space, stays as it is.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from training.captions import canonical
from training.clips import BACKGROUNDS, SIZE, Clip, all_combinations, draw_clip, is_held_out
from training.loop import MovingAverage, run_steps
from training.train_denoiser import encode_captions
from training.train_vae import _decode_unclamped, to_model_range

NUM_STEPS = 600
LEARNING_RATE = 8e-4
BATCH_SIZE = 8
MIN_SIGMA, MAX_SIGMA = 0.05, 0.6
CROP_CELLS, CELL_PX = 4, 8


def train_decoder(
    vae: AutoencoderKLWan,
    transformer: ZImageTransformer2DModel,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    work: Path,
    seed: int,
    num_steps: int = NUM_STEPS,
) -> None:
    """Train the decoder in place; everything else stays as it is."""
    vae.requires_grad_(False)
    parts = {"decoder": vae.decoder.train(), "post_quant_conv": vae.post_quant_conv}
    parameters = [p for part in parts.values() for p in part.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.99), weight_decay=1e-4)
    average = MovingAverage(parts, decay=0.99)
    seen = [c for c in all_combinations() if not is_held_out(c)]
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    deviation = torch.tensor(vae.config.latents_std).view(shape)

    @torch.no_grad()
    def restored_latents(clips: list[Clip], captions: list[str], f_patch_size: int) -> Tensor:
        pixels = torch.stack([to_model_range(clip.pixels) for clip in clips])
        latents = (vae.encode(pixels).latent_dist.mode() - mean) / deviation
        sigma = torch.empty(len(clips)).uniform_(MIN_SIGMA, MAX_SIGMA)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * latents + level * torch.randn_like(latents)
        texts = encode_captions(tokenizer, text_encoder, captions)
        velocity = transformer(
            list(noisy.unbind()), 1 - sigma, texts, f_patch_size=f_patch_size, return_dict=False
        )[0]
        return (noisy + level * torch.stack(velocity)) * deviation + mean

    def train_step(step: int) -> dict[str, float]:
        chance = random.Random(f"decoder-{seed}-{step}")
        torch.manual_seed(chance.getrandbits(48))
        random_numbers = np.random.default_rng(chance.getrandbits(48))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 20, (1 - step / num_steps) / 0.7, 1.0)
        combinations = chance.choices(seen, k=BATCH_SIZE)
        clips = [
            draw_clip(combination, chance.choice(list(BACKGROUNDS)), random_numbers)
            for combination in combinations
        ]
        captions = [canonical(combination) for combination in combinations]
        latents = restored_latents(clips, captions, chance.choice((1, 1, 2, 4)))
        crops = [_crop(clip, latent, chance) for clip, latent in zip(clips, latents, strict=True)]
        latent_crops, pixels, alpha = (torch.stack(parts) for parts in zip(*crops, strict=True))
        error = _decode_unclamped(vae, latent_crops) - pixels
        loss = ((1 + 2 * alpha) * (error.abs() + error.square())).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        return {"loss": loss.item()}

    saved = {**parts, "optimizer": optimizer, "average": average}
    run_steps("decoder", num_steps, saved, train_step, work / "decoder.pt")
    average.copy_to_modules()
    vae.eval()


def _crop(clip: Clip, latents: Tensor, chance: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """A window of whole latent cells around the shape at a random moment.

    latents: [C, F', 8, 8]. Returns latents [C, F', 4, 4], pixels [3, F, 32, 32] in -1..1 and
    coverage [1, F, 32, 32].
    """
    moment = chance.randrange(len(clip.alpha))
    middle = np.argwhere(clip.alpha[moment] > 0.5).mean(axis=0) / CELL_PX
    last = SIZE // CELL_PX - CROP_CELLS
    top, left = (
        min(max(round(centre - CROP_CELLS / 2 + chance.uniform(-1, 1)), 0), last)
        for centre in middle
    )
    cells = (slice(top, top + CROP_CELLS), slice(left, left + CROP_CELLS))
    rows, columns = (slice(cell.start * CELL_PX, cell.stop * CELL_PX) for cell in cells)
    pixels = to_model_range(clip.pixels[:, rows, columns])
    alpha = torch.from_numpy(clip.alpha[:, rows, columns])[None]
    return latents[:, :, *cells], pixels, alpha
