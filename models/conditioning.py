"""What each family's denoiser is told: numpy arrays, so that no torch is needed to pass them on."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class Conditioning(Protocol):
    """What is known of any family's."""

    @property
    def num_tokens(self) -> int:
        """The prompt's, before it was cut to the model's limit; 0 if it takes none."""
        ...

    @property
    def num_texts(self) -> int:
        """How many a step predicts with: 2 with classifier-free guidance."""
        ...


class Guided:
    """Of those that have a positive text and, with classifier-free guidance, a negative one."""

    __slots__ = ()
    positive: Any
    negative: Any

    @property
    def num_texts(self) -> int:
        """How many a step predicts with."""
        return 1 if self.negative is None else 2

    @property
    def texts(self) -> list[Any]:
        """The negative one first, as diffusers' pipelines have them in a batch."""
        return [self.positive] if self.negative is None else [self.negative, self.positive]


@dataclass(frozen=True, slots=True)
class TextPlaces:
    """Of a positive text that is several, one after the other: the lengths of each, and where those
    after the first have their say, bool [R, F, H, W] by the transformer's tokens.
    """

    lengths: tuple[int, ...]
    tokens: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ZImageConditioning(Guided):
    """Text states [N, D], positive and negative.

    start_latents: [C, 1, H, W], the start frame's normalised latents, if there is one;
    source_latents: [C, F, H, W], those of a video that is to be changed; mask: [F, H, W] in 0..1,
    by latents: how much of it is to be made anew; control: the latents of what leads it.
    places: where the parts of the positive text have their say, if it has parts.
    """

    positive: FloatArray
    negative: FloatArray | None
    start_latents: FloatArray | None
    source_latents: FloatArray | None
    num_tokens: int
    control: FloatArray | None = None
    places: TextPlaces | None = None
    mask: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class AnimateDiffConditioning(Guided):
    """CLIP's states [77, D] of the positive and the negative text.

    source_latents: [C, F, H, W] of a video that is to be changed, scaled as the UNet has them.
    start: the start image, and control, what leads the video, as their control networks take them:
    latents [C, F, H, W], or pixels [3, F, H, W] in 0..1.
    """

    positive: FloatArray
    negative: FloatArray | None
    source_latents: FloatArray | None
    num_tokens: int
    start: FloatArray | None = None
    control: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class SvdConditioning:
    """A start image: CLIP's embedding [1, D] and the VAE's latents [C, H, W], with noise added.

    generator: the request's, after that noise was drawn, uint8 [N]. With guidance, the second
    "text" is zeros.
    """

    embedding: FloatArray
    latents: FloatArray
    generator: NDArray[np.uint8]
    guided: bool
    num_tokens: int = 0

    @property
    def num_texts(self) -> int:
        """How many a step predicts with."""
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True)
class HunyuanText:
    """States [N, D] of a text's tokens, without padding, and CLIP's pooled ones [P]."""

    states: FloatArray
    pooled: FloatArray


@dataclass(frozen=True, slots=True)
class HunyuanConditioning(Guided):
    """The texts; of image-to-video those that have seen the start image, and its latents,
    [C, 1, H, W].
    """

    positive: HunyuanText
    negative: HunyuanText | None
    start_latents: FloatArray | None
    num_tokens: int
