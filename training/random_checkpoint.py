"""Writes a randomly initialised z-image-video checkpoint: the real classes and layout, no skill.

Tests use a tiny one; benchmarks one whose steps cost what a benchmark needs.
"""

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from training.text_encoder import make_text_encoder, make_tokenizer, save_text_encoder
from training.train_vae import make_vae

MANIFEST = Path(__file__).with_name("manifest.json")
HEAD_DIM = 32


def make_image_vae(latent_channels: int) -> AutoencoderKL:
    """An image model's, eight times smaller in space, as Z-Image's but tiny."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def write_random_checkpoint(
    folder: Path, *, dim: int, num_layers: int, seed: int = 0, **manifest: object
) -> None:
    """dim: a multiple of 32; keyword arguments replace entries of the demo's manifest."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    save_text_encoder(tokenizer, make_text_encoder(len(tokenizer)), folder)
    make_vae().save_pretrained(folder / "vae", safe_serialization=True)
    ZImageTransformer2DModel(
        all_patch_size=(2, 2, 2),
        all_f_patch_size=(1, 2, 4),
        in_channels=8,
        dim=dim,
        n_layers=num_layers,
        n_refiner_layers=1,
        n_heads=dim // HEAD_DIM,
        n_kv_heads=dim // HEAD_DIM,
        cap_feat_dim=128,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 64, 64],
    ).save_pretrained(folder / "transformer", safe_serialization=True)
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    content = {**json.loads(MANIFEST.read_text()), "trained": False, **manifest}
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")
