"""Writes tiny control networks for the random checkpoints; every weight of theirs has an effect."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import nn


def write_random_z_image_control(
    transformer: Path, folder: Path, *, refiner: str | None = None, spare: int = 0, seed: int = 0
) -> None:
    """For the transformer in a folder.

    refiner: `add_control_noise_refiner`, as versions differ in it; spare: channels of the control
    beside its latents.
    """
    torch.manual_seed(seed)
    config: Any = ZImageTransformer2DModel.load_config(transformer)
    model = ZImageControlNetModel(
        control_layers_places=list(range(0, config["n_layers"], 2)),
        control_refiner_layers_places=list(range(config["n_refiner_layers"])),
        control_in_dim=config["in_channels"] + spare,
        add_control_noise_refiner=refiner,
        all_patch_size=config["all_patch_size"],
        all_f_patch_size=config["all_f_patch_size"],
        **{key: config[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
    )
    _save(model, folder)


def write_random_controlnet(folder: Path, *, width: int = 8, seed: int = 0) -> None:
    """A ControlNet for the random `animatediff`."""
    torch.manual_seed(seed)
    _save(
        ControlNetModel(
            block_out_channels=(width, width),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
            conditioning_embedding_out_channels=(4, 4, 4, 4),
        ),
        folder,
    )


def write_random_sparse_control(
    folder: Path, *, latents: bool = True, width: int = 8, seed: int = 0
) -> None:
    """SparseCtrl for the random `animatediff`, of RGB pictures' latents or of scribbles."""
    torch.manual_seed(seed)
    _save(
        SparseControlNetModel(
            conditioning_channels=4 if latents else 3,
            use_simplified_condition_embedding=latents,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            block_out_channels=(width, width),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
            motion_num_attention_heads=2,
            conditioning_embedding_out_channels=(4, 4, 4, 4),
        ),
        folder,
    )


RANDOM_CONTROLS: dict[str, Callable[[Path], None]] = {
    "controlnet": write_random_controlnet,
    "sparse-rgb": write_random_sparse_control,
    "sparse-scribble": partial(write_random_sparse_control, latents=False),
}


def _save(model: Any, folder: Path) -> None:
    """A control network begins without effect: the layers where it speaks are zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
                module.reset_parameters()
    model.save_pretrained(folder)
