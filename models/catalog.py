"""What a deployed model is: its folder, its manifest and the sizes that it can generate."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, Field, ValidationError

from models.compute import THE_BEST, Compute
from models.families import FIELDS_OF_FAMILIES, MAX_FREE_NOISE_FRAMES, SVD_FAMILIES
from models.fit import MemoryProfile
from models.request import (
    ControlKind,
    InvalidRequest,
    ModelFamily,
    NotSupported,
    Scheduler,
    StepCache,
    VideoRequest,
)
from models.request_bounds import check_request
from models.source import Remote
from models.spec import (
    LAYOUTS,
    FamilySpec,
    Use,
    WeightsDamaged,
    WeightsMissing,
    has_whole_motion_unet,
    read_json,
)
from models.territories import Territory
from models.weight_files import check_weight_files, sha256_of

if TYPE_CHECKING:
    from models.control import ControlNet
    from models.lora import Lora

IMAGE_TOKEN = "<image>"
# Z-Image pads its texts' and its image's tokens to multiples of it.
TOKENS_PADDED_TO = 32


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
    f_patch_size: int = 1
    num_steps: int
    guidance_scale: float
    min_guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    motion_bucket_id: int | None = None
    noise_aug_strength: float | None = None
    scheduler: Scheduler | None = None


class MeasuredSkipping(BaseModel, frozen=True, extra="forbid"):
    """What `mutoscope models measure` found of a way to skip passes: the PSNR of the frames, in
    dB, against those of the same requests with all passes, in the mean of the videos and of the
    worst; and the share of the passes that were made.
    """

    step_cache: StepCache | None = None
    cfg_skip_ratio: float | None = None
    num_steps: int
    guidance_scale: float
    f_patch_size: int
    scheduler: Scheduler | None = None
    num_videos: int
    psnr_db: float
    min_psnr_db: float
    passes_made: float


class ModelManifest(BaseModel, frozen=True, extra="forbid"):
    """manifest.json beside a checkpoint; sha256 maps relative file names to their check sums.

    territory_exclusions: ISO 3166-1 codes, and EU, where the licence does not apply.
    max_free_noise_frames: of AnimateDiff with `free_noise`.
    decode_chunk_frames: how many frames SVD's and AnimateDiff's VAEs decode at a time; SVD's look
    at each other within a chunk, so it is part of what the video looks like.
    """

    family: ModelFamily
    description: str
    trained: bool
    licence: str
    commercial_use: bool = True
    territory_exclusions: tuple[Literal["EU"] | Territory, ...] = ()
    vae: str
    max_text_tokens: int = Field(ge=1)
    min_frames: int = Field(ge=1)
    max_frames: int = Field(ge=1)
    max_side: int = Field(ge=16)
    max_area: int = Field(ge=256)
    decode_chunk_frames: int = Field(8, ge=1)
    max_free_noise_frames: int = Field(MAX_FREE_NOISE_FRAMES, ge=1)
    defaults: RequestDefaults
    skipping: tuple[MeasuredSkipping, ...] = ()
    memory: MemoryProfile | None = None
    sha256: dict[str, str] = Field(default_factory=dict)

    def told_by_publisher(self) -> str:
        """Canonical JSON of all but what is measured of the same weights later."""
        return self.model_dump_json(exclude={"skipping", "memory"})

    def measured_skipping(self, request: VideoRequest) -> MeasuredSkipping | None:
        """What was measured of just the passes that a request skips, in steps like its."""
        if request.source_video is not None or request.last_step < request.num_steps:
            return None
        asked = way_of(request)
        return next((found for found in self.skipping if way_of(found) == asked), None)


def way_of(of: VideoRequest | MeasuredSkipping) -> dict[str, Any]:
    """How passes are skipped, of a request that may not have been checked, too."""
    names = {"step_cache", "cfg_skip_ratio", "num_steps"}
    names |= {"guidance_scale", "f_patch_size", "scheduler"}
    return of.model_dump(mode="json", include=names, warnings=False)


class Addition(Protocol):
    """Weights beside a model's own: a LoRA, a control network."""

    @property
    def id(self) -> str:
        """What the operator calls it."""
        ...

    @property
    def sha256(self) -> str:
        """Of its files."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        ...

    @property
    def remote(self) -> Remote | None:
        """Where they come from, if not from this machine."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A checked checkpoint: what it is called here, where it lies and what it can generate.

    loras, controls: those that a request may ask for. compute: how those who hold it compute it.
    remote: where its files come from, if not from this machine.
    """

    id: str
    folder: Path
    manifest: ModelManifest
    spec: FamilySpec
    compute: Compute = THE_BEST
    remote: Remote | None = None
    loras: "tuple[Lora, ...]" = ()
    controls: "tuple[ControlNet, ...]" = ()

    @property
    def denoiser_bytes(self) -> int:
        """Of the denoiser's weights, as stored, and of its LoRAs' and control networks'."""
        parts = [self.folder / part for part in LAYOUTS[self.manifest.family].denoiser]
        files = [file for part in parts for file in part.glob("*.safetensors")]
        own = sum(file.stat().st_size for file in files)
        return own + sum(addition.size_bytes for addition in self.additions)

    @property
    def additions(self) -> "list[Addition]":
        """All that may change what its denoiser computes."""
        return [*self.loras, *self.controls]

    @property
    def start_image(self) -> Use:
        """Whether it takes one: AnimateDiff does by a control network of sparse frames."""
        if self.manifest.family is ModelFamily.ANIMATEDIFF and self.start_control is not None:
            return Use.OPTIONAL
        return self.spec.start_image

    @property
    def start_control(self) -> "ControlNet | None":
        """The network that a start image leads by."""
        by_image = [net for net in self.controls if net.is_sparse and ControlKind.RGB in net.kinds]
        return next(iter(by_image), None)

    def control_net(self, kind: ControlKind) -> "ControlNet":
        """The first that takes pictures of a kind; InvalidRequest."""
        for net in self.controls:
            if kind in net.kinds:
                return net
        there = ", ".join(sorted({kind for net in self.controls for kind in net.kinds})) or "none"
        raise InvalidRequest("control", f"{self.id} has no control of the type {kind}: {there}")

    @property
    def max_frames(self) -> int:
        """Of one request without `free_noise`."""
        return min(self.manifest.max_frames, self.spec.max_positions or self.manifest.max_frames)

    def min_frames(self, request: VideoRequest) -> int:
        """Of one like this: with `free_noise` more than a window."""
        windows = request.free_noise
        return self.manifest.min_frames if windows is None else windows.context_length + 1

    @property
    def most_frames_windowed(self) -> int | None:
        """Of one request with `free_noise`; None: the family has none."""
        takes_it = self.manifest.family in FIELDS_OF_FAMILIES["free_noise"]
        return self.manifest.max_free_noise_frames if takes_it else None

    def resolve(self, fields: dict[str, Any]) -> VideoRequest:
        """Fill in the defaults and check every bound; raises InvalidRequest naming the field."""
        family = self.manifest.family
        for name, families in FIELDS_OF_FAMILIES.items():
            if fields.get(name) not in (None, "", (), []) and family not in families:
                raise NotSupported(name, f"{name} means nothing to {family}")
        defaults = self.manifest.defaults.model_dump(exclude_none=True)
        if fields.get("motion_strength") is not None and family in SVD_FAMILIES:
            defaults.pop("motion_bucket_id", None)
            if fields.get("motion_bucket_id") is not None:
                message = "motion_bucket_id and motion_strength say the same: give one"
                raise InvalidRequest("motion_strength", message)
        if isinstance(control := fields.get("control"), dict):
            fields = {**fields, "control": self._with_default_scale(control)}
        values = {
            **defaults,
            "seed": secrets.randbelow(2**31),
            **fields,
            "model": self.id,
            "family": family,
        }
        try:
            request = VideoRequest.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(param, f"{param}: {first['msg']}") from None
        check_request(self, request)
        for name in ("prompt", "negative_prompt"):
            # HunyuanVideo's encoder puts the start image where this stands
            if family is ModelFamily.HUNYUAN_VIDEO and IMAGE_TOKEN in getattr(request, name):
                raise InvalidRequest(name, f"{name} must not contain {IMAGE_TOKEN}")
        return request

    def check_inputs(self, *, start_image: bool, source_video: bool = False) -> None:
        """InvalidRequest if a request has what the model does not take, or lacks what it needs."""
        if source_video and not self.spec.source_video:
            raise NotSupported("video", f"{self.id} does not change videos")
        if start_image and self.start_image is Use.REFUSED:
            raise NotSupported("input_reference", f"{self.id} makes videos from words alone")
        if not start_image and self.start_image is Use.REQUIRED:
            message = f"input_reference is required: {self.id} makes videos from an image"
            raise InvalidRequest("input_reference", message)

    def _with_default_scale(self, control: dict[str, Any]) -> dict[str, Any]:
        """The publishers' scale of the network that will lead; a wrong kind is told elsewhere."""
        scales: dict[str, float] = {
            kind: net.default_scale for net in self.controls[::-1] for kind in net.kinds
        }
        scale = scales.get(str(control.get("type")))
        return control if scale is None else {"scale": scale, **control}

    def max_text_tokens(self, request: VideoRequest) -> int:
        """Of each of the request's texts; several share the model's positions."""
        token_frames = self.spec.latent_size(request)[0] // request.f_patch_size
        variance = request.seed_variance
        per_frame = variance is not None and variance.per_frame
        num_texts = token_frames if per_frame else 1 + len(request.regions)
        if self.spec.position_limit is None or num_texts == 1:
            return self.manifest.max_text_tokens
        room = (self.spec.position_limit - 1 - token_frames) // TOKENS_PADDED_TO * TOKENS_PADDED_TO
        return min(self.manifest.max_text_tokens, room // num_texts)


def load_model(folder: Path, model_id: str | None = None) -> Model:
    """Read and check a checkpoint without loading it; the id defaults to the family's name.

    Raises WeightsMissing or WeightsDamaged with the file's path.
    """
    manifest = read_manifest(folder)
    layout = LAYOUTS[manifest.family]
    components = layout.components
    if manifest.family is ModelFamily.ANIMATEDIFF and not has_whole_motion_unet(folder):
        components = (*components, "motion_adapter")
    _check_files(folder, manifest.sha256, components)
    return Model(
        id=model_id or str(manifest.family),
        folder=folder,
        manifest=manifest,
        spec=layout.read(folder),
    )


def read_manifest(folder: Path) -> ModelManifest:
    """WeightsMissing or WeightsDamaged with the file's path."""
    try:
        return ModelManifest.model_validate(read_json(folder / "manifest.json"))
    except ValidationError as error:
        raise WeightsDamaged(str(folder / "manifest.json"), str(error)) from None


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path = folder / "manifest.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def add_to_manifest(folder: Path, **entries: Any) -> None:
    """Put these in place of what was there, whole or not at all."""
    write_manifest(folder, {**read_json(folder / "manifest.json"), **entries})


def _check_files(folder: Path, sha256: dict[str, str], components: tuple[str, ...]) -> None:
    """Every listed file is there and unchanged, every component has weights, all are whole."""
    for name, digest in sha256.items():
        path = folder / name
        if not path.is_file():
            raise WeightsMissing(str(path))
        if sha256_of(path) != digest:
            raise WeightsDamaged(str(path), "its SHA-256 is not the manifest's")
    for component in components:
        if not list((folder / component).glob("*.safetensors")):
            raise WeightsMissing(str(folder / component / "*.safetensors"))
    check_weight_files(folder)
