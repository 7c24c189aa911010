"""Loads parts of a checkpoint: safetensors only, complete or not at all."""

import logging
from pathlib import Path
from typing import Any

import torch

from models.compute import Compute, ComputeUnavailable, Dtype, WeightStorage
from models.spec import WeightsDamaged

logger = logging.getLogger(__name__)

# The first GPUs that compute in bfloat16.
BFLOAT16_CAPABILITY = 8
DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
}


def choose_device() -> torch.device:
    """The first CUDA device that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(device: torch.device, compute: Compute) -> torch.dtype:
    """What is asked for; else float32 on a CPU, bfloat16 on a GPU that has it in hardware (Ampere
    on), float16 on others. ComputeUnavailable for a bfloat16 that would only be emulated.
    """
    on_gpu = device.type == "cuda"
    has_bfloat16 = not on_gpu or torch.cuda.get_device_capability(device)[0] >= BFLOAT16_CAPABILITY
    if compute.dtype is None:
        best = Dtype.BFLOAT16 if has_bfloat16 else Dtype.FLOAT16
        return DTYPES[best if on_gpu else Dtype.FLOAT32]
    if compute.dtype is Dtype.BFLOAT16 and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise ComputeUnavailable(Dtype.BFLOAT16, f"{name} does not compute in it")
    return DTYPES[compute.dtype]


def store_weights(network: Any, compute: Compute, device: torch.device, dtype: torch.dtype) -> None:
    """Keep the weights of a network, which `loading_device` has, as asked; what computes with them
    is none the wiser.
    """
    match compute.weights:
        case WeightStorage.FP8:
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
            network.to(device)
        case WeightStorage.OFFLOADED:
            network.enable_group_offload(
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=device.type == "cuda",
            )
    logger.info("%s: %s, weights %s", type(network).__name__, dtype, compute.weights)


def loading_device(compute: Compute, device: torch.device) -> torch.device:
    """Where a network is read to: what does not lie whole on the GPU may not fit there whole."""
    is_whole = compute.weights is WeightStorage.WHOLE
    return device if is_whole else torch.device("cpu")


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
