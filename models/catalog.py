"""What a deployed model is: its folder, its manifest and the sizes that it can generate."""

import hashlib
import json
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from models.request import InvalidRequest, ModelFamily, VideoRequest

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
CHUNK_BYTES = 1 << 20


class WeightsMissing(Exception):
    """A file that the checkpoint needs is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"checkpoint file missing: {self.path}"


class WeightsDamaged(Exception):
    """A file of the checkpoint is not what it should be."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"checkpoint file damaged: {self.path}: {self.reason}"


class ModelNotFound(Exception):
    """No model of that name is deployed."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"The model {self.model!r} does not exist or is not deployed here."


class RequestDefaults(BaseModel, frozen=True, extra="forbid"):
    """What a request gets that names only a prompt."""

    num_frames: int
    width: int
    height: int
    fps: int
    f_patch_size: int
    num_steps: int
    guidance_scale: float


class ModelManifest(BaseModel, frozen=True, extra="forbid"):
    """manifest.json beside a checkpoint; sha256 maps relative file names to their check sums."""

    family: ModelFamily
    description: str
    trained: bool
    licence: str
    vae: str
    max_text_tokens: int = Field(ge=1)
    min_frames: int = Field(ge=1)
    max_frames: int = Field(ge=1)
    max_side: int = Field(ge=16)
    max_area: int = Field(ge=256)
    defaults: RequestDefaults
    sha256: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A checked checkpoint: what it is called here, where it lies and what it can generate.

    frame_stride is the VAE's temporal compression (4k+1 frames make k+1 latent frames);
    latent_scale its spatial one, pixel_patch that part of it which is patches of pixels, and
    size_multiple latent_scale times the transformer's patch.
    """

    id: str
    folder: Path
    manifest: ModelManifest
    f_patch_sizes: tuple[int, ...]
    frame_stride: int
    latent_scale: int
    pixel_patch: int
    size_multiple: int

    @property
    def denoiser_bytes(self) -> int:
        """Of the transformer's weights, as stored."""
        files = (self.folder / "transformer").glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def generated_frames(self, num_frames: int, f_patch_size: int) -> int:
        """The least frame count >= num_frames whose latent frames fill whole temporal patches."""
        latent_frames = -(-(num_frames - 1) // self.frame_stride) + 1
        latent_frames = -(-latent_frames // f_patch_size) * f_patch_size
        return (latent_frames - 1) * self.frame_stride + 1

    def generated_size(self, width: int, height: int) -> tuple[int, int]:
        """The least size >= the asked one that the model can generate."""
        multiple = self.size_multiple
        return -(-width // multiple) * multiple, -(-height // multiple) * multiple

    def resolve(self, fields: dict[str, Any]) -> VideoRequest:
        """Fill in the defaults and check every bound; raises InvalidRequest naming the field."""
        values = {
            **self.manifest.defaults.model_dump(),
            "seed": secrets.randbelow(2**31),
            **fields,
            "model": self.id,
            "family": self.manifest.family,
        }
        try:
            request = VideoRequest.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(param, f"{param}: {first['msg']}") from None
        self._check_bounds(request)
        return request

    def _check_bounds(self, request: VideoRequest) -> None:
        manifest = self.manifest
        if not manifest.min_frames <= request.num_frames <= manifest.max_frames:
            raise InvalidRequest(
                "num_frames",
                f"num_frames must be {manifest.min_frames} to {manifest.max_frames} "
                f"for {self.id}, not {request.num_frames}",
            )
        if request.f_patch_size not in self.f_patch_sizes:
            sizes = ", ".join(map(str, self.f_patch_sizes))
            raise InvalidRequest("f_patch_size", f"f_patch_size must be one of {sizes}")
        for param, side in (("width", request.width), ("height", request.height)):
            if side % 2:
                raise InvalidRequest("size", f"{param} must be even, not {side}")
            if not self.size_multiple <= side <= manifest.max_side:
                raise InvalidRequest(
                    "size",
                    f"{param} must be {self.size_multiple} to {manifest.max_side}, not {side}",
                )
        if request.width * request.height > manifest.max_area:
            raise InvalidRequest("size", f"width x height must be at most {manifest.max_area}")


def load_model(folder: Path, model_id: str | None = None) -> Model:
    """Read and check a checkpoint without loading it; the id defaults to the family's name.

    Raises WeightsMissing or WeightsDamaged with the file's path.
    """
    try:
        manifest = ModelManifest.model_validate(_read_json(folder / "manifest.json"))
    except ValidationError as error:
        raise WeightsDamaged(str(folder / "manifest.json"), str(error)) from None
    _check_files(folder, manifest.sha256)
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    return Model(
        id=model_id or str(manifest.family),
        folder=folder,
        manifest=manifest,
        f_patch_sizes=tuple(transformer["all_f_patch_size"]),
        frame_stride=vae["scale_factor_temporal"],
        latent_scale=vae["scale_factor_spatial"],
        pixel_patch=vae["patch_size"] or 1,
        size_multiple=vae["scale_factor_spatial"] * transformer["all_patch_size"][0],
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsMissing(str(path))
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsDamaged(str(path), str(error)) from None
    if not isinstance(content, dict):
        raise WeightsDamaged(str(path), "not a JSON object")
    return content


def _check_files(folder: Path, sha256: dict[str, str]) -> None:
    """Every listed file is there and unchanged, every safetensors file whole, nothing pickled."""
    for name, digest in sha256.items():
        path = folder / name
        if not path.is_file():
            raise WeightsMissing(str(path))
        if _digest(path) != digest:
            raise WeightsDamaged(str(path), "its SHA-256 is not the manifest's")
    for component in ("text_encoder", "transformer", "vae"):
        if not list((folder / component).glob("*.safetensors")):
            raise WeightsMissing(str(folder / component / "*.safetensors"))
    for path in sorted(folder.glob("*/*")):
        if path.suffix in PICKLE_SUFFIXES:
            raise WeightsDamaged(str(path), "pickled weights are refused; use safetensors")
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _check_safetensors(path: Path) -> None:
    """The header parses and the last tensor ends where the file does."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightsDamaged(str(path), "too short for a safetensors header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > size_bytes - 8:
            raise WeightsDamaged(str(path), "its header is longer than the file")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise WeightsDamaged(str(path), f"its header is not JSON: {error}") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + header_bytes + max(ends, default=0) != size_bytes:
        raise WeightsDamaged(str(path), "it is shorter or longer than its header says")
