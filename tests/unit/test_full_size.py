"""The published configurations, on no device: as many parameters, and shapes that fit together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

from models.cost import UNET_PARAMETERS
from models.request import ModelFamily

Build = Callable[[], Any]
MILLION = 1e6


def on_meta(build: Build) -> Any:
    with torch.device("meta"):
        return build().to("meta")  # diffusers makes some parameters on the CPU all the same


def num_parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


def sd15_unet() -> Any:
    return UNet2DConditionModel(cross_attention_dim=768, sample_size=64)


def hunyuan(**config: Any) -> Build:
    return lambda: HunyuanVideoTransformer3DModel(**config)


def adapter(mid_block: bool) -> Build:
    return lambda: MotionAdapter(use_motion_mid_block=mid_block)


def svd_unet() -> Any:
    return UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))


def image_vae(kind: Any, **config: Any) -> Any:
    levels = (128, 256, 512, 512)
    down = ["DownEncoderBlock2D"] * 4
    return kind(down_block_types=down, block_out_channels=levels, layers_per_block=2, **config)


@pytest.mark.parametrize(
    ("build", "published_millions"),
    [
        (sd15_unet, 859.5),
        (adapter(True), 453.2),
        (adapter(False), 417.1),
        (svd_unet, 1524.6),
        (lambda: image_vae(AutoencoderKLTemporalDecoder), 97.7),
        (hunyuan(), 12821.0),
        (AutoencoderKLHunyuanVideo, 246.5),
        (lambda: AutoencoderKLWan(z_dim=16), 126.9),
        (ZImageTransformer2DModel, 6154.9),
        (
            lambda: ZImageTransformer2DModel(all_patch_size=(2, 2, 2), all_f_patch_size=(1, 2, 4)),
            6159.8,
        ),
    ],
)
def test_a_class_has_as_many_parameters_as_its_publishers_say(
    build: Build, published_millions: float
) -> None:
    counted = num_parameters(on_meta(build)) / MILLION
    assert counted == pytest.approx(published_millions, rel=1e-3)


def test_costs_are_told_for_these_unets() -> None:
    joined = on_meta(lambda: UNetMotionModel.from_unet2d(sd15_unet(), adapter(False)()))
    counts = {
        ModelFamily.ANIMATEDIFF: num_parameters(joined),
        ModelFamily.SVD_XT: num_parameters(on_meta(svd_unet)),
    }
    for family, counted in counts.items():
        assert counted == pytest.approx(UNET_PARAMETERS[family], rel=1e-3)


def test_published_sizes_go_through_the_denoisers() -> None:
    """129 frames of 1280x720: 33 latent ones of 160x90; image-to-video by concatenation too.

    One block of each kind: all others have the same shapes.
    """
    few: dict[str, int] = {"num_layers": 1, "num_single_layers": 1}
    for channels in (16, 33):
        transformer = on_meta(hunyuan(in_channels=channels, out_channels=16, **few))
        with torch.no_grad(), torch.device("meta"):
            out = transformer(
                torch.empty(1, channels, 33, 90, 160),
                torch.empty(1),
                torch.empty(1, 256, 4096),
                torch.empty(1, 256),
                torch.empty(1, 768),
                torch.empty(1),
            ).sample
        assert out.shape == (1, 16, 33, 90, 160)


@pytest.mark.parametrize(
    ("build", "latents", "arguments", "frames"),
    [
        (lambda: image_vae(AutoencoderKLTemporalDecoder), (25, 4, 72, 128), {"num_frames": 25},
         (25, 3, 576, 1024)),
        (lambda: image_vae(AutoencoderKL, up_block_types=["UpDecoderBlock2D"] * 4,
                           latent_channels=4),
         (16, 4, 64, 64), {}, (16, 3, 512, 512)),
        (lambda: AutoencoderKLWan(z_dim=16), (1, 16, 12, 90, 160), {}, (1, 3, 45, 720, 1280)),
        (AutoencoderKLHunyuanVideo, (1, 16, 5, 90, 160), {}, (1, 3, 17, 720, 1280)),
    ],
)  # fmt: skip
def test_published_latents_become_published_frames(
    build: Build, latents: tuple[int, ...], arguments: dict[str, Any], frames: tuple[int, ...]
) -> None:
    vae = on_meta(build)
    with torch.no_grad(), torch.device("meta"):
        decoded = vae.decode(torch.empty(latents), **arguments).sample
    assert decoded.shape == frames
