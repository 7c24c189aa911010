"""The contract between the stages, and the one place that knows which file runs a family."""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from models.catalog import Model
from models.request import ModelFamily, VideoRequest
from models.tensors import Conditioning, DenoiseState, Frames
from models.tiles import Box
from parallel.plan import StepShape

if TYPE_CHECKING:
    from parallel.mesh import Mesh


class Encoder(Protocol):
    """Turns the words and the start image of a request into Conditioning."""

    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
    ) -> Conditioning:
        """start_image: a PNG of the frame's size; source_frames: uint8 [F, H, W, 3] of it."""
        ...


class Denoiser(Protocol):
    """Draws the noise, then removes it step by step."""

    def use(self, mesh: "Mesh") -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        ...

    def shape(self, request: VideoRequest, num_texts: int) -> StepShape:
        """What one step of the request costs; num_texts: 2 with classifier-free guidance."""
        ...

    def start(self, request: VideoRequest, conditioning: Conditioning) -> DenoiseState:
        """Step 0, noise from the request's seed alone; later if a source video is only changed."""
        ...

    def step(
        self, request: VideoRequest, conditioning: Conditioning, state: DenoiseState
    ) -> DenoiseState:
        """One step on."""
        ...

    def batch(self, request: VideoRequest) -> Hashable | None:
        """Requests of the same may make their steps in one, by step_all; None: alone."""
        ...

    def step_all(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[Conditioning],
        states: Sequence[DenoiseState],
    ) -> list[DenoiseState]:
        """One step on of each, in one pass of the model, by one rank alone."""
        ...


class Decoder(Protocol):
    """Turns final latents, float32 [1, C, F, H, W], into frames, in temporal order."""

    def decode(self, request: VideoRequest, latents: NDArray[np.float32]) -> Iterator[Frames]:
        """Frames trimmed to the request's count and size."""
        ...

    def decode_tile(self, latents: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
        """One tile of the frames, [C, F, h, w] about -1..1, for `models.tiles` to join."""
        ...


class FamilyNotBuilt(Exception):
    """The family has a price but no code here runs it yet."""

    def __init__(self, family: str) -> None:
        super().__init__(family)
        self.family = family

    def __str__(self) -> str:
        return f"no code here runs the model family {self.family!r} yet"


def load_encoder(model: Model) -> Encoder:
    """Load what encoding needs: the text encoder and the VAE's encoder."""
    _check_built(model)
    from models.z_image_video import ZImageVideoEncoder

    return ZImageVideoEncoder(model)


def load_denoiser(model: Model) -> Denoiser:
    """Load the transformer and the scheduler's configuration."""
    _check_built(model)
    from models.z_image_video import ZImageVideoDenoiser

    return ZImageVideoDenoiser(model)


def load_decoder(model: Model) -> Decoder:
    """Load the VAE's decoder."""
    _check_built(model)
    from models.z_image_video import ZImageVideoDecoder

    return ZImageVideoDecoder(model)


def _check_built(model: Model) -> None:
    if model.manifest.family is not ModelFamily.Z_IMAGE_VIDEO:
        raise FamilyNotBuilt(model.manifest.family)
