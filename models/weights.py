"""Loads parts of a checkpoint: safetensors only, complete or not at all."""

from pathlib import Path
from typing import Any

import torch

from models.spec import WeightsDamaged


def choose_device() -> torch.device:
    """The first CUDA device that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU; bfloat16 on a GPU that has it in hardware (Ampere on), else float16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def load_component(component: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`component.from_pretrained` for diffusers and transformers classes, in evaluation mode.

    Both libraries fill parameters that the file lacks at random, or leave them on the meta
    device, and only report it: here that is WeightsDamaged, naming the folder and the keys.
    """
    try:
        module, report = component.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise WeightsDamaged(str(folder), str(error)) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            keys = ", ".join(sorted(map(str, report[kind]))[:5])
            raise WeightsDamaged(str(folder), f"{kind.replace('_', ' ')}: {keys}")
    return module.to(device).eval().requires_grad_(False)
