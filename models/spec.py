"""What a checkpoint's own configuration files say of the videos that it can make."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from models.request import ModelFamily, Scheduler, VideoRequest

SCHEDULER_CLASSES = {
    "DDIMScheduler": Scheduler.DDIM,
    "EulerDiscreteScheduler": Scheduler.EULER,
    "LCMScheduler": Scheduler.LCM,
}


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


class Use(StrEnum):
    """Whether a model takes something."""

    REFUSED = "refused"
    OPTIONAL = "optional"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """The frames and sizes that a checkpoint generates, and what it makes them from.

    frame_stride is the VAE's temporal compression (4k+1 frames make k+1 latent frames);
    latent_scale its spatial one, pixel_patch that part of it which is patches of pixels;
    size_multiple: of width and height. dropped_frames: decoded before the video's first.
    max_positions: the most frames that it tells apart, None: any number. in_tiles: whether frames
    may be decoded in tiles by several decoders; in_chunks: whether runs of decode_chunk_frames may.
    scheduler: the checkpoint's own, if it is one that
    a request may name. guidance: whether guidance_scale means anything to it. position_limit: how
    many texts' and frames' tokens, one after the other, have positions; None: any number.
    """

    f_patch_sizes: tuple[int, ...]
    frame_stride: int
    latent_scale: int
    size_multiple: int
    start_image: Use
    source_video: bool
    pixel_patch: int = 1
    dropped_frames: int = 0
    max_positions: int | None = None
    in_tiles: bool = False
    in_chunks: bool = False
    scheduler: Scheduler | None = None
    guidance: bool = True
    position_limit: int | None = None

    def generated_frames(self, num_frames: int, f_patch_size: int) -> int:
        """The least frame count whose latent frames fill whole temporal patches and leave
        num_frames when those before the first are dropped.
        """
        decoded = num_frames + self.dropped_frames
        latent_frames = -(-(decoded - 1) // self.frame_stride) + 1
        latent_frames = -(-latent_frames // f_patch_size) * f_patch_size
        return (latent_frames - 1) * self.frame_stride + 1

    def generated_size(self, width: int, height: int) -> tuple[int, int]:
        """The least size >= the asked one that the model can generate."""
        multiple = self.size_multiple
        return -(-width // multiple) * multiple, -(-height // multiple) * multiple

    def latent_size(self, request: VideoRequest) -> tuple[int, int, int]:
        """Frames, height and width of the latents that a request is generated from."""
        width, height = self.generated_size(request.width, request.height)
        frames = self.generated_frames(request.num_frames, request.f_patch_size)
        latent_frames = (frames - 1) // self.frame_stride + 1
        return latent_frames, height // self.latent_scale, width // self.latent_scale


@dataclass(frozen=True, slots=True)
class Layout:
    """A family's folder: components with weights, those of the denoiser apart, and how to read it.

    Configurations are read by `read`, which is given the folder.
    """

    components: tuple[str, ...]
    denoiser: tuple[str, ...]
    read: Callable[[Path], FamilySpec]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; WeightsMissing, WeightsDamaged."""
    if not path.is_file():
        raise WeightsMissing(str(path))
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsDamaged(str(path), str(error)) from None
    if not isinstance(content, dict):
        raise WeightsDamaged(str(path), "not a JSON object")
    return content


def _config(folder: Path, component: str, *keys: str) -> dict[str, Any]:
    """A component's config.json; WeightsDamaged if a key that is read later is not there."""
    path = folder / component / "config.json"
    content = read_json(path)
    for key in keys:
        if key not in content:
            raise WeightsDamaged(str(path), f"it has no {key}")
    return content


def _z_image_video(folder: Path) -> FamilySpec:
    transformer = _config(folder, "transformer", "all_f_patch_size", "all_patch_size")
    patch = transformer["all_patch_size"][0]
    positions = _config(folder, "transformer", "axes_lens")["axes_lens"][0]
    f_patch_sizes = tuple(transformer["all_f_patch_size"])
    if has_image_vae(folder):
        scale = _image_vae_scale(folder)  # an image model's, frame by frame
        return FamilySpec(
            f_patch_sizes=f_patch_sizes,
            frame_stride=1,
            latent_scale=scale,
            size_multiple=scale * patch,
            start_image=Use.OPTIONAL,
            source_video=True,
            in_chunks=True,
            position_limit=positions,
        )
    keys = ("scale_factor_temporal", "scale_factor_spatial", "patch_size")
    vae = _config(folder, "vae", *keys)
    return FamilySpec(
        f_patch_sizes=f_patch_sizes,
        frame_stride=vae["scale_factor_temporal"],
        latent_scale=vae["scale_factor_spatial"],
        size_multiple=vae["scale_factor_spatial"] * patch,
        start_image=Use.OPTIONAL,
        source_video=True,
        pixel_patch=vae["patch_size"] or 1,
        in_tiles=True,
        position_limit=positions,
    )


def _animatediff(folder: Path) -> FamilySpec:
    scale = _image_vae_scale(folder)
    part = "unet" if has_whole_motion_unet(folder) else "motion_adapter"
    motion = _config(folder, part, "motion_max_seq_length")
    return FamilySpec(
        f_patch_sizes=(1,),
        frame_stride=1,
        latent_scale=scale,
        size_multiple=scale,
        start_image=Use.REFUSED,
        source_video=True,
        in_chunks=True,
        max_positions=motion["motion_max_seq_length"],
        scheduler=SCHEDULER_CLASSES.get(
            read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
        ),
    )


def _svd(folder: Path) -> FamilySpec:
    scale = _image_vae_scale(folder)
    # Its UNet halves the latents between its levels and has no way to join odd ones again.
    halvings = len(_config(folder, "unet", "block_out_channels")["block_out_channels"]) - 1
    return FamilySpec(
        f_patch_sizes=(1,),
        frame_stride=1,
        latent_scale=scale,
        size_multiple=scale * 2**halvings,
        start_image=Use.REQUIRED,
        source_video=False,
        in_chunks=True,
    )


def _hunyuan_video(folder: Path) -> FamilySpec:
    transformer = _config(folder, "transformer", "patch_size", "patch_size_t")
    vae = _config(folder, "vae", "temporal_compression_ratio", "spatial_compression_ratio")
    # How a start image comes in; "latent_concat" generates that image before the video.
    condition = transformer.get("image_condition_type")
    return FamilySpec(
        f_patch_sizes=(transformer["patch_size_t"],),
        frame_stride=vae["temporal_compression_ratio"],
        latent_scale=vae["spatial_compression_ratio"],
        size_multiple=vae["spatial_compression_ratio"] * transformer["patch_size"],
        start_image=Use.REFUSED if condition is None else Use.REQUIRED,
        source_video=False,
        dropped_frames=vae["temporal_compression_ratio"] if condition == "latent_concat" else 0,
        guidance=bool(transformer.get("guidance_embeds", False)),
    )


def has_image_vae(folder: Path) -> bool:
    """Whether the VAE is an image model's, which works frame by frame."""
    return _config(folder, "vae").get("_class_name") == "AutoencoderKL"


def has_whole_motion_unet(folder: Path) -> bool:
    """Whether AnimateDiff's UNet has its motion modules in it, and needs no adapter beside it."""
    return _config(folder, "unet").get("_class_name") == "UNetMotionModel"


def _image_vae_scale(folder: Path) -> int:
    """Every level but the last halves."""
    levels: list[int] = _config(folder, "vae", "block_out_channels")["block_out_channels"]
    return 1 << len(levels) - 1


_SVD = Layout(("image_encoder", "unet", "vae"), ("unet",), _svd)

LAYOUTS = {
    ModelFamily.Z_IMAGE_VIDEO: Layout(
        ("text_encoder", "transformer", "vae"), ("transformer",), _z_image_video
    ),
    ModelFamily.ANIMATEDIFF: Layout(
        ("text_encoder", "unet", "vae"), ("unet", "motion_adapter"), _animatediff
    ),
    ModelFamily.SVD: _SVD,
    ModelFamily.SVD_XT: _SVD,
    ModelFamily.HUNYUAN_VIDEO: Layout(
        ("text_encoder", "text_encoder_2", "transformer", "vae"), ("transformer",), _hunyuan_video
    ),
}
