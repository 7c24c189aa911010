"""The values that pass between the stages of a model.

Whatever crosses a process is a numpy array: Ray shares those without a copy, torch tensors not.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the denoiser is told: float32 text states [N, D], positive and negative.

    start_latents: float32 [C, 1, H, W], the start frame's normalised latents, if there is one;
    source_latents: float32 [C, F, H, W], those of a video that is to be changed.
    num_tokens counts the prompt's tokens before truncation to the model's limit.
    """

    positive: NDArray[np.float32]
    negative: NDArray[np.float32] | None
    start_latents: NDArray[np.float32] | None
    source_latents: NDArray[np.float32] | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DenoiseState:
    """Latents [1, C, F, H, W] in float32 after `step` of `num_steps` steps."""

    latents: "Tensor"
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Frames:
    """A run of decoded frames: pixels uint8 [F, H, W, 3] in RGB, played at fps a second."""

    pixels: NDArray[np.uint8]
    fps: int
