"""What a request takes of a GPU's memory, and whether it fits: torch-free, for whoever admits it.

What a model needs is told by its manifest's `memory`, which `models.memory_profile` finds from its
configuration files: weights by their number, the rest as bytes that grow with what is computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from models.compute import Compute, Dtype, WeightStorage
from models.request import ModelFamily, VideoRequest

if TYPE_CHECKING:
    from models.catalog import Model

# Of a GPU's memory, what is neither CUDA's own nor lost between blocks.
USABLE = 0.92
# Tokens that a rank sends and receives to attend over all of them: query, key and value, twice.
EXCHANGED = 6
# Tokens of all ranks, joined at the end: as they came, joined, and normalised.
JOINED = 3
# Latents in float32 beside the network: the state, and a prediction that waits for another.
LATENT_COPIES = 2
DTYPE_BYTES = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}


class Affine(BaseModel, frozen=True, extra="forbid"):
    """Bytes: base, and more for each unit."""

    base: float = Field(ge=0)
    per_unit: float = Field(ge=0)

    def at(self, units: float) -> float:
        """Bytes for so many units."""
        return self.base + self.per_unit * units


class PartMemory(BaseModel, frozen=True, extra="forbid"):
    """A network: its weights, and what it takes beside them in numbers of two and of four bytes.

    rounded: how many may be stored in eight bits; fixed: those outside of the runs of blocks, which
    stay on the GPU; largest_layer, largest_block: the weights of these.
    """

    parameters: int = Field(ge=1)
    rounded: int = Field(0, ge=0)
    fixed: int = Field(0, ge=0)
    largest_layer: int = Field(0, ge=0)
    largest_block: int = Field(0, ge=0)
    two_bytes: Affine
    four_bytes: Affine

    def weights(self, dtype: Dtype, storage: WeightStorage = WeightStorage.WHOLE) -> float:
        """Bytes on the GPU, those that are there for a moment included."""
        size = DTYPE_BYTES[dtype]
        match storage:
            case WeightStorage.FP8:
                wide = self.parameters - self.rounded + self.largest_layer
                return float(self.rounded + size * wide)
            case WeightStorage.OFFLOADED:
                return float(size * (self.fixed + 2 * self.largest_block))
        return float(size * self.parameters)

    def beside(self, dtype: Dtype, units: float) -> float:
        """Bytes for so many units."""
        return (self.two_bytes if DTYPE_BYTES[dtype] == 2 else self.four_bytes).at(units)


class MemoryProfile(BaseModel, frozen=True, extra="forbid"):
    """Of a model. A unit of the denoiser is a token of a transformer (latents_per_token latents, of
    each of a temporal patch's frames; width numbers), or a latent of a UNet (width 0), of each text
    if they are made at once, as they are if batches_texts and one rank makes both; of the
    decoder a latent of one frame, chunk_frames of which are decoded at once. tile: of so many
    latents squared is a tile, if the decoder can do with them; always_tiled: it takes no others.
    """

    denoiser: PartMemory
    decoder: PartMemory
    latent_channels: int = Field(ge=1)
    latents_per_token: int = Field(1, ge=1)
    batches_texts: bool = True
    width: int = Field(0, ge=0)
    chunk_frames: int = Field(1, ge=1)
    tile: int | None = None
    always_tiled: bool = False


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one GPU: of weights, and of all else at the peak."""

    weights: float
    beside: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.weights + self.beside


def denoise_footprint(
    model: "Model", request: VideoRequest, degree: int, dtype: Dtype, num_requests: int = 1
) -> Footprint:
    """Of one of the ranks that share each step; ValueError for a model without a profile.

    Whether they share texts, frames or tokens, each has its part of what is computed. num_requests:
    how many like it a rank that is alone may make in one step, of a family that has batches.
    """
    profile = _profile(model)
    frames, height, width = model.spec.latent_size(request)
    latents = frames * height * width
    units = float(latents)
    if profile.width:
        units = latents / (request.f_patch_size * profile.latents_per_token)
        units += model.max_text_tokens(request)
    branches = request.passes_per_step if degree > 1 else 1
    if profile.width:
        here = units / (degree / branches)
    else:
        here = -(-frames // max(1, degree // branches)) * height * width
    if profile.batches_texts:
        here *= request.passes_per_step / branches
    if degree == 1 and request.family is ModelFamily.Z_IMAGE_VIDEO:
        here *= num_requests
    beside = profile.denoiser.beside(dtype, here)
    if degree > 1 and profile.width:
        token = profile.width * DTYPE_BYTES[dtype]
        beside += EXCHANGED * token * units / degree
        beside = max(beside, profile.denoiser.beside(dtype, 0) + JOINED * token * units)
    beside += LATENT_COPIES * 4.0 * profile.latent_channels * latents
    return Footprint(denoiser_weights(model, dtype), beside)


def denoiser_weights(model: "Model", dtype: Dtype) -> float:
    """Bytes on each rank, those of what is beside the model's own included."""
    own = _profile(model).denoiser.weights(dtype, model.compute.weights)
    return own + sum(addition.size_bytes for addition in model.additions)


def decode_footprint(
    model: "Model", request: VideoRequest, dtype: Dtype, *, in_tiles: bool = False
) -> Footprint:
    """Of the decoder; in_tiles: if it decodes one tile after another of those that it is given."""
    profile = _profile(model)
    frames, height, width = model.spec.latent_size(request)
    one_tile = height * width
    if profile.tile is not None:
        one_tile = min(height, profile.tile) * min(width, profile.tile)
    beside = profile.decoder.beside(dtype, one_tile if in_tiles else height * width)
    if profile.always_tiled and profile.tile is not None:
        # what one tile takes is no larger for a larger frame: it is the line's base
        base = profile.decoder.beside(dtype, 0)
        beside += base * (one_tile / profile.tile**2 - 1)
    beside *= min(frames, profile.chunk_frames) / profile.chunk_frames
    return Footprint(decoder_weights(model, dtype), beside)


def decoder_weights(model: "Model", dtype: Dtype) -> float:
    """Bytes on its GPU."""
    return _profile(model).decoder.weights(dtype)


def _profile(model: "Model") -> MemoryProfile:
    if model.manifest.memory is None:
        raise ValueError(f"the manifest of {model.id} does not say what memory it takes")
    return model.manifest.memory


@dataclass(frozen=True, slots=True)
class Placement:
    """How a request fits: the least degree, how weights are kept, whether frames are tiled."""

    degree: int
    weights: WeightStorage
    in_tiles: bool
    denoise: Footprint
    decode: Footprint


@dataclass(frozen=True, slots=True)
class Gpus:
    """What a tier's denoiser and decoder have: so many GPUs of so many bytes, and what they compute
    in.
    """

    memory_bytes: int
    count: int
    dtype: Dtype

    @property
    def usable(self) -> float:
        """Bytes of one GPU."""
        return USABLE * self.memory_bytes


def place(
    model: "Model",
    request: VideoRequest,
    gpus: Gpus,
    storages: Iterable[WeightStorage] = WeightStorage,
) -> Placement | None:
    """The first way that fits: whole weights before rounded and before fetched ones, then the least
    degree, frames in one piece before tiles. None: there is none.
    """
    degrees = [1 << power for power in range(gpus.count.bit_length())]
    for storage in storages:
        stored = replace(model, compute=Compute(weights=storage))
        for degree in degrees:
            denoise = denoise_footprint(stored, request, degree, gpus.dtype)
            if denoise.total > gpus.usable:
                continue
            for in_tiles in (False, True) if model.spec.in_tiles else (False,):
                decode = decode_footprint(model, request, gpus.dtype, in_tiles=in_tiles)
                if decode.total <= gpus.usable:
                    return Placement(degree, storage, in_tiles, denoise, decode)
    return None
