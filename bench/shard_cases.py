"""Small models of the real classes, with inputs, for whoever compares one rank with several.

Every parameter is random: a zero would hide what it multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

TEXTS = 2
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class FrameCase:
    """A model that takes some of a clip's frames, and gives them along frame_dim."""

    model: nn.Module
    call: Callable[[slice], Tensor]
    frame_dim: int


@dataclass(frozen=True, slots=True)
class TokenCase:
    """A transformer, called with a whole clip and one of TEXTS texts."""

    model: Any
    call: Callable[[int], Tensor]


def randomised(model: Model, seed: int = 0) -> Model:
    """The same values on every rank; activations keep about their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def animatediff(num_frames: int, *, width: int = 8, size: int = 6) -> FrameCase:
    """A `UNetMotionModel` of two resolutions; another text for each frame, as IP-Adapter makes."""
    unet = UNet2DConditionModel(
        block_out_channels=(width, width),
        layers_per_block=1,
        sample_size=size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    adapter = MotionAdapter(
        block_out_channels=(width, width),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    model = randomised(UNetMotionModel.from_unet2d(unet, adapter))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(TEXTS, 4, num_frames, size, size, generator=generator)
    text = torch.randn(TEXTS, num_frames, 5, 8, generator=generator)

    def call(frames: slice) -> Tensor:
        states = text[:, frames].flatten(0, 1)
        sample: Tensor = model(latents[:, :, frames], 7, encoder_hidden_states=states).sample
        return sample

    return FrameCase(model, call, frame_dim=2)


def svd(num_frames: int, *, width: int = 32, size: int = 8) -> FrameCase:
    """A `UNetSpatioTemporalConditionModel` of two resolutions."""
    model = randomised(
        UNetSpatioTemporalConditionModel(
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            sample_size=size,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16,
            num_attention_heads=(2, 4),
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        )
    )
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(TEXTS, num_frames, 8, size, size, generator=generator)
    image = torch.randn(TEXTS, 1, 16, generator=generator)
    added = torch.randn(TEXTS, 3, generator=generator)

    def call(frames: slice) -> Tensor:
        sample: Tensor = model(latents[:, frames], 7, image, added).sample
        return sample

    return FrameCase(model, call, frame_dim=1)


def svd_decoder(num_frames: int) -> FrameCase:
    """SVD's `TemporalDecoder`."""
    model = randomised(TemporalDecoder(4, 3, block_out_channels=(32, 32), layers_per_block=1))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(num_frames, 4, 4, 4, generator=generator)

    def call(frames: slice) -> Tensor:
        here = latents[frames]
        decoded: Tensor = model(here, torch.zeros(1, len(here)), num_frames=len(here))
        return decoded

    return FrameCase(model, call, frame_dim=0)


def z_image(
    *,
    heads: int = 4,
    head_width: int = 16,
    num_layers: int = 3,
    frames: int = 4,
    size: int = 6,
    text: int = 7,
    f_patch: int = 1,
    control: bool = False,
) -> TokenCase:
    """A `ZImageTransformer2DModel`; control: residuals between its blocks."""
    width = head_width * heads
    model = randomised(
        ZImageTransformer2DModel(
            all_patch_size=(2, 2, 2),
            all_f_patch_size=(1, 2, 4),
            in_channels=4,
            dim=width,
            n_layers=num_layers,
            n_refiner_layers=2,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=16,
            axes_dims=[head_width // 2, head_width // 4, head_width // 4],
            axes_lens=[512, 64, 64],
        )
    )
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, frames, size, size, generator=generator)
    states = torch.randn(TEXTS, text, 16, generator=generator)
    samples = None
    if control:
        tokens = frames // f_patch * (size // 2) ** 2
        padded = -(-tokens // 32) * 32 + -(-text // 32) * 32
        samples = {
            layer: torch.randn(1, padded, width, generator=generator)
            for layer in (0, num_layers - 1)
        }

    def call(text: int) -> Tensor:
        outputs = model(
            [latents],
            torch.tensor([0.4]),
            [states[text]],
            f_patch_size=f_patch,
            controlnet_block_samples=samples,
        )
        sample: Tensor = outputs.sample[0]
        return sample

    return TokenCase(model, call)


def hunyuan(
    *,
    heads: int = 4,
    rope_axes: tuple[int, int, int] = (2, 4, 4),
    num_layers: int = 2,
    frames: int = 3,
    size: int = 5,
    text: int = 7,
    token_replace: bool = False,
) -> TokenCase:
    """A `HunyuanVideoTransformer3DModel`; heads are as wide as rope_axes together."""
    model = randomised(
        HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=heads,
            attention_head_dim=sum(rope_axes),
            num_layers=num_layers,
            num_single_layers=num_layers,
            num_refiner_layers=1,
            patch_size=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=rope_axes,
            image_condition_type="token_replace" if token_replace else None,
        )
    )
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, frames, size, size, generator=generator)
    states = torch.randn(TEXTS, 1, text, 16, generator=generator)
    pooled = torch.randn(1, 8, generator=generator)

    mask = torch.ones(1, text, dtype=torch.int64)

    def call(text: int) -> Tensor:
        guidance = torch.tensor([6000.0])
        sample: Tensor = model(
            latents, torch.tensor([400]), states[text], mask, pooled, guidance
        ).sample
        return sample

    return TokenCase(model, call)
