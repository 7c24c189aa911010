"""The contract between the stages, and the one place that knows which file runs a family."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.catalog import Model
from models.conditioning import Conditioning
from models.embeddings import Embeddings
from models.fetch import fetch_parts
from models.request import ModelFamily, VideoRequest
from models.tensors import DenoiseState, Frames
from models.tiles import Box
from parallel.plan import StepShape

if TYPE_CHECKING:
    from parallel.mesh import Mesh


Made = TypeVar("Made", bound=Conditioning, covariant=True)
Told = TypeVar("Told", bound=Conditioning, contravariant=True)


class Encoder(Protocol[Made]):
    """Turns the words and the start image of a request into Conditioning."""

    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
        embeddings: Embeddings | None = None,
    ) -> Made:
        """start_image: a PNG of the frame's size; source_frames: uint8 [F, H, W, 3] of it.

        embeddings: where what was encoded before may be found; counts what was not.
        """
        ...


class ControlEncoder(Encoder[Made], Protocol[Made]):
    """One whose family takes `control`."""

    def encode_control(
        self,
        request: VideoRequest,
        frames: NDArray[np.uint8],
        embeddings: Embeddings | None = None,
    ) -> NDArray[np.float32]:
        """The pictures uint8 [F, H, W, 3] that lead, as the control network takes them."""
        ...


class Denoiser(Protocol[Told]):
    """Draws the noise, then removes it step by step."""

    def use(self, mesh: "Mesh") -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        ...

    def shape(self, request: VideoRequest, num_texts: int) -> StepShape:
        """What one step of the request costs; num_texts: 2 with classifier-free guidance."""
        ...

    def start(self, request: VideoRequest, conditioning: Told) -> DenoiseState:
        """Step 0, noise from the request's seed alone; later if a source video is only changed."""
        ...

    def step(self, request: VideoRequest, conditioning: Told, state: DenoiseState) -> DenoiseState:
        """One step on."""
        ...

    def num_blocks(self, request: VideoRequest, num_texts: int) -> int:
        """How many blocks this rank runs through in a step; after each of them it may pause."""
        ...

    def batch(self, request: VideoRequest) -> Hashable | None:
        """Requests of the same may make their steps in one, by step_all; None: alone."""
        ...

    def step_all(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[Told],
        states: Sequence[DenoiseState],
    ) -> list[DenoiseState]:
        """One step on of each, in one pass of the model, by one rank alone; ValueError for more
        than one request of a family that has no batches.
        """
        ...


class OneAtATime(ABC, Generic[Told]):
    """A denoiser whose requests never share a step: no more than `step` is its own."""

    def batch(self, request: VideoRequest) -> Hashable | None:
        """Every request makes its steps alone."""
        return None

    def step_all(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[Told],
        states: Sequence[DenoiseState],
    ) -> list[DenoiseState]:
        """One step of the only request."""
        ((request, told, state),) = zip(requests, conditionings, states, strict=True)
        return [self.step(request, told, state)]

    @abstractmethod
    def step(self, request: VideoRequest, conditioning: Told, state: DenoiseState) -> DenoiseState:
        """One step on."""


class Decoder(Protocol):
    """Turns final latents, float32 [1, C, F, H, W], into frames, in temporal order."""

    def decode(self, request: VideoRequest, latents: NDArray[np.float32]) -> Iterator[Frames]:
        """Frames trimmed to the request's count and size."""
        ...


class TileDecoder(Decoder, Protocol):
    """One whose frames may be decoded in tiles: `FamilySpec.in_tiles`."""

    def decode_tile(self, latents: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
        """One tile of the frames, [C, F, h, w] about -1..1, for `models.tiles` to join."""
        ...


class ChunkDecoder(Decoder, Protocol):
    """One whose frames are decoded so many at a time, by several decoders if they are there:
    `FamilySpec.in_chunks`.
    """

    def decode_chunk(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents [1, C, F, h, w] of a run of frames -> [3, F, H, W] about -1..1."""
        ...


@dataclass(frozen=True, slots=True)
class Stages:
    """A family's classes; each is made with its Model, and loads its part of the weights then."""

    encoder: Callable[[Model], Encoder[Any]]
    denoiser: Callable[[Model], Denoiser[Any]]
    decoder: Callable[[Model], Decoder]


def load_encoder(model: Model) -> Encoder[Any]:
    """Load what encoding needs: text and image encoders, and the VAE's encoder."""
    fetch_parts(model)
    return _stages_of(model.manifest.family).encoder(model)


def load_denoiser(model: Model) -> Denoiser[Any]:
    """Load the transformer or the UNet, and the scheduler's configuration."""
    fetch_parts(model)
    return _stages_of(model.manifest.family).denoiser(model)


def load_decoder(model: Model) -> Decoder:
    """Load the VAE's decoder."""
    fetch_parts(model)
    return _stages_of(model.manifest.family).decoder(model)


def _stages_of(family: ModelFamily) -> Stages:
    """Imports torch, and the file of this family only."""
    match family:
        case ModelFamily.Z_IMAGE_VIDEO:
            from models.z_image_encoder import ZImageVideoEncoder
            from models.z_image_video import ZImageVideoDecoder, ZImageVideoDenoiser

            return Stages(ZImageVideoEncoder, ZImageVideoDenoiser, ZImageVideoDecoder)
        case ModelFamily.ANIMATEDIFF:
            from models.animatediff import (
                AnimateDiffDecoder,
                AnimateDiffDenoiser,
                AnimateDiffEncoder,
            )

            return Stages(AnimateDiffEncoder, AnimateDiffDenoiser, AnimateDiffDecoder)
        case ModelFamily.SVD | ModelFamily.SVD_XT:
            from models.svd import SvdDecoder, SvdDenoiser, SvdEncoder

            return Stages(SvdEncoder, SvdDenoiser, SvdDecoder)
        case ModelFamily.HUNYUAN_VIDEO:
            from models.hunyuan_video import (
                HunyuanVideoDecoder,
                HunyuanVideoDenoiser,
                HunyuanVideoEncoder,
            )

            return Stages(HunyuanVideoEncoder, HunyuanVideoDenoiser, HunyuanVideoDecoder)
