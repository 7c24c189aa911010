"""The constants of a step's cost are what the real classes count, at full size, on no device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import TemporalResnetBlock
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D, UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.cost import denoise_shape
from models.request import ModelFamily
from parallel.plan import FrameShape, TokenShape

BF16 = 2
EXACT = 0.005


def on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def count_flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        call()
    return float(counter.get_total_flops())


def animatediff() -> tuple[nn.Module, Callable[[], Any], int]:
    model = on_meta(
        lambda: UNetMotionModel(
            cross_attention_dim=768, num_attention_heads=8, motion_num_attention_heads=8
        )
    )
    text = torch.empty(2 * 16, 77, 768, device="meta")
    return model, lambda: model(torch.empty(2, 4, 16, 64, 64), torch.empty(()), text), 16


def svd_xt() -> tuple[nn.Module, Callable[[], Any], int]:
    model = on_meta(lambda: UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20)))
    model = model.to("meta")  # diffusers makes AlphaBlender's parameter on the CPU all the same
    image, added = on_meta(lambda: (torch.empty(2, 1, 1024), torch.empty(2, 3)))
    return model, lambda: model(torch.empty(2, 25, 8, 72, 128), torch.ones(()), image, added), 25


@pytest.mark.parametrize(
    ("build", "family", "size"),
    [
        (animatediff, ModelFamily.ANIMATEDIFF, (16, 512, 512)),
        (svd_xt, ModelFamily.SVD_XT, (25, 1024, 576)),
    ],
)
def test_a_unets_step_costs_what_the_class_counts(
    build: Callable[[], tuple[nn.Module, Callable[[], Any], int]],
    family: ModelFamily,
    size: tuple[int, int, int],
) -> None:
    model, call, num_frames = build()
    activations, edges, norms = [], [], 0

    def note(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        activations.append(output.numel() * BF16)

    def note_edge(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        edges.append(given[0].numel() // num_frames * BF16)

    for module in model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.proj_in.register_forward_hook(note)
            norms += 1
        elif isinstance(module, TemporalBasicTransformerBlock):
            module.register_forward_hook(note)
        elif isinstance(module, TemporalResnetBlock):
            module.conv1.register_forward_pre_hook(note_edge)
            module.conv2.register_forward_pre_hook(note_edge)
            norms += 2
    shape = denoise_shape(family, *size)
    assert isinstance(shape, FrameShape)
    assert shape.flops == pytest.approx(count_flops(call), rel=EXACT)
    assert shape.temporal_bytes == pytest.approx(sum(activations), rel=EXACT)
    assert shape.halo_bytes == pytest.approx(sum(edges), rel=EXACT)
    assert shape.num_collectives == 2 * len(activations) + len(edges) + norms


def z_image(latent_frames: int, size: int) -> float:
    model = on_meta(
        lambda: ZImageTransformer2DModel(all_patch_size=(2, 2, 2), all_f_patch_size=(1, 2, 4))
    )
    return count_flops(
        lambda: model(
            [torch.empty(16, latent_frames, size, size)],
            torch.empty(1),
            [torch.empty(512, 2560)],
        )
    )


def hunyuan(latent_frames: int, size: int) -> float:
    model = on_meta(HunyuanVideoTransformer3DModel)
    text, mask, pooled = on_meta(
        lambda: (torch.empty(1, 256, 4096), torch.empty(1, 256), torch.empty(1, 768))
    )
    return count_flops(
        lambda: model(
            torch.empty(1, 16, latent_frames, size, size),
            torch.empty(1),
            text,
            mask,
            pooled,
            torch.empty(1),
        )
    )


@pytest.mark.parametrize(
    ("count", "family"),
    [(z_image, ModelFamily.Z_IMAGE_VIDEO), (hunyuan, ModelFamily.HUNYUAN_VIDEO)],
)
def test_a_transformers_step_costs_what_the_class_counts(
    count: Callable[[int, int], float], family: ModelFamily
) -> None:
    latent_frames, size = 8, 64
    shape = denoise_shape(family, 4 * (latent_frames - 1) + 1, 8 * size, 8 * size, guided=False)
    assert isinstance(shape, TokenShape)
    counted = count(latent_frames, size)
    # Z-Image's two refiners attend over fewer tokens than the layers that they are counted among
    assert shape.linear_flops + shape.attention_flops == pytest.approx(counted, rel=0.01)
