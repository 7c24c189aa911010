"""Whose attention a network computes with: asked once if it works here, and told in the log."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.compute import Attention, Compute, ComputeUnavailable

logger = logging.getLogger(__name__)

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# From here on GPUs have flash attention; older ones gain by xformers.
FLASH_CAPABILITY = 8
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


def use_attention(network: Any, compute: Compute, device: torch.device, dtype: torch.dtype) -> None:
    """Have a loaded UNet or transformer compute as asked, or as is best; ComputeUnavailable."""
    is_unet = hasattr(network, "down_blocks")
    chosen = _choose(compute.attention, device, dtype, is_unet=is_unet)
    if chosen is Attention.XFORMERS:
        network.enable_xformers_memory_efficient_attention()
    elif chosen is Attention.FLASH:
        # while it runs, torch may not fall back on attention that writes out all weights
        network.forward = sdpa_kernel(FUSED)(network.forward)
    why = "as configured" if compute.attention is not None else "the best here"
    logger.info("%s: attention by %s, %s, on %s", type(network).__name__, chosen, why, device)


def attention_kernels() -> tuple[bool, bool, bool, bool]:
    """Which of torch's own the process may use now: flash, memory efficient, plain, cuDNN's."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def use_attention_kernels(allowed: tuple[bool, bool, bool, bool]) -> None:
    """May use these from now on."""
    flash, efficient, plain, cudnn = allowed
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(plain)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _choose(
    asked: Attention | None, device: torch.device, dtype: torch.dtype, *, is_unet: bool
) -> Attention:
    if asked is Attention.XFORMERS:
        if not is_unet:
            reason = "tokens are shared by torch's attention; xformers is for UNets"
            raise ComputeUnavailable(asked, reason)
        probe_xformers(device, dtype)
        return asked
    if asked is Attention.FLASH:
        probe_flash(device, dtype)
        return asked
    if asked is None and is_unet and _is_older(device):
        try:
            probe_xformers(device, dtype)
        except ComputeUnavailable as error:
            logger.info("%s", error)
        else:
            return Attention.XFORMERS
    return Attention.SDPA


def probe_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """ComputeUnavailable if it does not do one small attention, in the weights' own type: diffusers
    asks in float32, and once for each layer.
    """
    try:
        import xformers.ops  # type: ignore[import-not-found]
    except ImportError as error:
        raise ComputeUnavailable(Attention.XFORMERS, f"it cannot be imported: {error}") from error
    query = torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)
    try:
        xformers.ops.memory_efficient_attention(query, query, query)
    except NotImplementedError as error:  # no operator takes these
        raise ComputeUnavailable(Attention.XFORMERS, f"on {device}: {error}") from error
    except torch.AcceleratorError as error:
        if error.error_code != NO_KERNEL_IMAGE:  # type: ignore[attr-defined]
            raise  # a fault of the GPU, not a lack
        raise ComputeUnavailable(Attention.XFORMERS, f"on {device}: {error}") from error


def probe_flash(device: torch.device, dtype: torch.dtype) -> None:
    """ComputeUnavailable if torch has no flash kernel for these."""
    query = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            F.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        reason = f"torch has no such kernel for {dtype} on {device}: {error}"
        raise ComputeUnavailable(Attention.FLASH, reason) from error


def _is_older(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] < FLASH_CAPABILITY
