"""The values that pass between the stages of a model.

Whatever crosses a process is a numpy array: Ray shares those without a copy, torch tensors not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenoiseState:
    """Latents [1, C, F, H, W] in float32 after `step` of `num_steps` steps, and all else that the
    next step needs.

    generator: the state of the request's generator, which lives on the CPU, uint8 [N]; scheduler:
    what a scheduler carries from step to step; cache: what `models.step_cache` does. skipped: the
    passes of the model, one a text, that the steps until now made do without.
    """

    latents: "Tensor"
    step: int
    num_steps: int
    generator: "Tensor"
    scheduler: "Mapping[str, Tensor]" = field(default_factory=dict)
    cache: "Mapping[str, Tensor]" = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class ParkedState:
    """A DenoiseState outside of torch, as it passes between processes and into a checkpoint."""

    latents: NDArray[np.float32]
    step: int
    num_steps: int
    generator: NDArray[np.uint8]
    scheduler: Mapping[str, NDArray[np.float32]]
    cache: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Frames:
    """A run of decoded frames: pixels uint8 [F, H, W, 3] in RGB, played at fps a second."""

    pixels: NDArray[np.uint8]
    fps: int
