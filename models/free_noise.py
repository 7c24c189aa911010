"""FreeNoise (Qiu et al., arXiv:2310.15169): AnimateDiff on more frames than it was trained on."""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FreeNoiseTransformerBlock
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from models.request import FreeNoise


class WindowedBlock(FreeNoiseTransformerBlock):
    """A motion module's block that sees a window of frames at a time, and takes the mean of what
    all windows make of a frame, those in whose middle it is for more.

    Upstream halves what it has of the last frames where the last window is not a whole stride from
    the one before; here that one is a window like the others.
    """

    def _get_frame_indices(self, num_frames: int) -> list[tuple[int, int]]:
        windows: list[tuple[int, int]] = super()._get_frame_indices(num_frames)
        if windows[-1][1] < num_frames:
            windows.append((num_frames - self.context_length, num_frames))
        return windows


class MotionWindows:
    """The motion modules of a UNet: whether they see all frames at once, or windows of them."""

    def __init__(self, unet: nn.Module) -> None:
        self.blocks: list[Any] = [
            block
            for module in unet.modules()
            if isinstance(module, AnimateDiffTransformer3D)
            for block in module.transformer_blocks
        ]

    def use(self, windows: FreeNoise | None) -> None:
        """From the next pass on. The two classes differ in what they do alone, not in what they
        have: so LoRAs, hooks and names of weights stay as they are.
        """
        for block in self.blocks:
            if windows is None:
                block.__class__ = BasicTransformerBlock
            else:
                block.__class__ = WindowedBlock
                block.set_free_noise_properties(windows.context_length, windows.context_stride)


def shuffle_noise(noise: Tensor, windows: FreeNoise, generator: torch.Generator) -> Tensor:
    """Noise [B, C, F, h, w] whose frames after the first window are those of a window before, in
    another order: so windows have as much in common as their places allow. As diffusers'
    `shuffle_context`.
    """
    shuffled = noise.clone()
    num_frames = noise.shape[2]
    for start in range(windows.context_length, num_frames, windows.context_stride):
        source = start - windows.context_length
        order = source + torch.randperm(windows.context_stride, generator=generator)
        frames = order[: num_frames - start].to(noise.device)
        shuffled[:, :, start : start + len(frames)] = shuffled[:, :, frames]
    return shuffled
