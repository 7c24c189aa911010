"""What a folder or a file of weights is, from its names and shapes alone: no weight is read.

Types and bases are the founding document's. The names of keys are those of the publishers' own
repositories, of diffusers' classes and of kohya's and MotionLoRA's files.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from models.catalog import load_model
from models.request import ModelFamily
from models.safetensors_header import Header, read_header
from models.spec import WeightsDamaged, WeightsMissing, read_json
from models.weight_files import PICKLE_SUFFIXES, check_weight_files, refuse_pickle


class ModelType(StrEnum):
    """What part a checkpoint plays."""

    MAIN = "main"
    VIDEO_VAE = "video_vae"
    MOTION_MODULE = "motion_module"
    LORA = "lora"
    CONTROLNET = "controlnet"


class Base(StrEnum):
    """What a part fits to."""

    Z_IMAGE = "z-image"
    Z_IMAGE_VIDEO = "z-image-video"
    HUNYUAN_VIDEO = "hunyuan-video"
    SVD = "svd"
    SD_1 = "sd-1"
    WAN = "wan"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint, and what else its files tell."""

    path: Path
    type: ModelType
    base: Base
    details: Mapping[str, Any] = field(default_factory=dict)


class NotRecognised(Exception):
    """A path that holds no model that is known here."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


FAMILY_BASES = {
    ModelFamily.Z_IMAGE_VIDEO: Base.Z_IMAGE_VIDEO,
    ModelFamily.ANIMATEDIFF: Base.SD_1,
    ModelFamily.SVD: Base.SVD,
    ModelFamily.SVD_XT: Base.SVD,
    ModelFamily.HUNYUAN_VIDEO: Base.HUNYUAN_VIDEO,
}
PIPELINES = {
    "ZImagePipeline": Base.Z_IMAGE,
    "AnimateDiffPipeline": Base.SD_1,
    "StableDiffusionPipeline": Base.SD_1,
    "StableVideoDiffusionPipeline": Base.SVD,
    "HunyuanVideoPipeline": Base.HUNYUAN_VIDEO,
    "HunyuanVideoImageToVideoPipeline": Base.HUNYUAN_VIDEO,
}
# A class's weights in a folder of their own.
COMPONENTS = {
    "MotionAdapter": (ModelType.MOTION_MODULE, Base.SD_1),
    "ControlNetModel": (ModelType.CONTROLNET, Base.SD_1),
    "SparseControlNetModel": (ModelType.CONTROLNET, Base.SD_1),
    "ZImageControlNetModel": (ModelType.CONTROLNET, Base.Z_IMAGE),
    "AutoencoderKLWan": (ModelType.VIDEO_VAE, Base.WAN),
    "AutoencoderKLHunyuanVideo": (ModelType.VIDEO_VAE, Base.HUNYUAN_VIDEO),
    "AutoencoderKLTemporalDecoder": (ModelType.VIDEO_VAE, Base.SVD),
    "ZImageTransformer2DModel": (ModelType.MAIN, Base.Z_IMAGE),
    "HunyuanVideoTransformer3DModel": (ModelType.MAIN, Base.HUNYUAN_VIDEO),
    "UNetSpatioTemporalConditionModel": (ModelType.MAIN, Base.SVD),
}
LORA_KEY = re.compile(
    r"lora_[AB]\.|lora_(up|down)\.|[._]lora\.(up|down)\.|\.lora_linear_layer\.(up|down)\.|\.alpha$"
)
# An OMI name of a kind of LoRA, as its maker wrote it into the file.
OMI_BASES = {"hunyuan-video/lora": Base.HUNYUAN_VIDEO, "stable-diffusion-v1/lora": Base.SD_1}
# The first that a key matches tells what a LoRA is for.
LORA_BASES = (
    (r"temporal_transformer_blocks", Base.SVD),
    (r"motion_modules", Base.SD_1),
    (r"double_blocks|single_blocks|single_transformer_blocks", Base.HUNYUAN_VIDEO),
    (r"^transformer_blocks[._]", Base.HUNYUAN_VIDEO),
    (r"^(layers|noise_refiner|context_refiner)[._]", Base.Z_IMAGE),
    (r"^(down_blocks|mid_block|up_blocks)[._]", Base.SD_1),
    (r"^(input_blocks|middle_block|output_blocks)[._]", Base.SD_1),
    (r"^text_model[._]", Base.SD_1),
)


# What files put before a layer's name.
LORA_PREFIXES = (
    "base_model.model.", "transformer.", "diffusion_model.", "unet.",
    "lora_transformer_", "lora_unet__", "lora_unet_", "lora_te_", "lora_te1_", "text_encoder.",
)  # fmt: skip


TEXT_PREFIXES = ("lora_te_", "lora_te1_", "text_encoder.")


def is_of_text(key: str) -> bool:
    """Whether a LoRA's key is of a text encoder's layer."""
    return key.removeprefix("base_model.model.").startswith(TEXT_PREFIXES)


def strip_prefixes(key: str) -> str:
    """A LoRA's key from the layer's name on."""
    for prefix in LORA_PREFIXES:
        key = key.removeprefix(prefix)
    return key


def probe(path: Path) -> Found:
    """Learn what is there; NotRecognised, or WeightsDamaged for what is no whole file."""
    if not path.exists():
        raise NotRecognised(path, "there is nothing")
    if path.is_dir():
        return _probe_folder(path)
    refuse_pickle(path)
    if path.suffix != ".safetensors":
        raise NotRecognised(path, "neither a folder nor a safetensors file")
    return _probe_file(path, read_header(path))


def find_all(folder: Path) -> "Iterator[Found | WeightsDamaged | WeightsMissing]":
    """Every checkpoint below a folder, or what is wrong with it; the parts of one are one."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.suffix in {".safetensors", *PICKLE_SUFFIXES}:
            try:
                yield probe(path)
            except (WeightsDamaged, WeightsMissing) as error:
                yield error
            except NotRecognised:
                if path.is_dir():
                    yield from find_all(path)


def _probe_folder(folder: Path) -> Found:
    if (folder / "manifest.json").is_file():
        model = load_model(folder)
        manifest = model.manifest
        details: dict[str, Any] = {"family": str(manifest.family), "trained": manifest.trained}
        if manifest.family is ModelFamily.Z_IMAGE_VIDEO:
            details["f_patch_sizes"] = list(model.spec.f_patch_sizes)
        details |= {"vae": manifest.vae, "licence": manifest.licence}
        return Found(folder, ModelType.MAIN, FAMILY_BASES[manifest.family], details)
    if (folder / "model_index.json").is_file():
        check_weight_files(folder)
        name = read_json(folder / "model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise NotRecognised(folder, f"a pipeline of the class {name}")
        return Found(folder, ModelType.MAIN, PIPELINES[name], _pipeline_details(folder, name))
    if (folder / "config.json").is_file():
        check_weight_files(folder)
        name = read_json(folder / "config.json").get("_class_name")
        if name not in COMPONENTS:
            raise NotRecognised(folder, f"a component of the class {name}")
        kind, base = COMPONENTS[name]
        return Found(folder, kind, base, {"class": name})
    raise NotRecognised(folder, "neither manifest.json, model_index.json nor config.json is there")


def _pipeline_details(folder: Path, name: str) -> dict[str, Any]:
    details: dict[str, Any] = {"class": name}
    if name == "ZImagePipeline":
        shift = read_json(folder / "scheduler" / "scheduler_config.json").get("shift", 0)
        details["variant"] = "base" if shift >= 5 else "turbo"
    elif name == "StableVideoDiffusionPipeline":
        num_frames = read_json(folder / "unet" / "config.json").get("num_frames", 0)
        details["family"] = str(ModelFamily.SVD_XT if num_frames >= 25 else ModelFamily.SVD)
    elif name.startswith("HunyuanVideo"):
        config = read_json(folder / "transformer" / "config.json")
        details["image_condition"] = config.get("image_condition_type")
    return details


def _probe_file(path: Path, header: Header) -> Found:
    for recognise in (_as_lora, _as_motion_module, _as_z_image, _as_others):
        if (found := recognise(path, header)) is not None:
            return found
    raise NotRecognised(path, "its keys are those of no model that is known here")


def _as_lora(path: Path, header: Header) -> Found | None:
    keys = list(header.shapes)
    if not any(LORA_KEY.search(key) for key in keys):
        return None
    architecture = header.metadata.get("modelspec.architecture", "")
    if architecture in OMI_BASES:
        told = {"modelspec.architecture": architecture}
        return Found(path, ModelType.LORA, OMI_BASES[architecture], told)
    for pattern, base in LORA_BASES:
        if any(re.search(pattern, strip_prefixes(key)) for key in keys):
            details: dict[str, Any] = {"motion": True} if pattern == "motion_modules" else {}
            return Found(path, ModelType.LORA, base, details)
    raise NotRecognised(path, "a LoRA whose keys fit no model that is known here")


def _as_motion_module(path: Path, header: Header) -> Found | None:
    positions = {
        shape[1]
        for key, shape in header.shapes.items()
        if "motion_modules" in key and key.endswith("pe") and len(shape) == 3
    }
    if not positions:
        return None
    if any(key.startswith("mid_block") for key in header.shapes):
        version = "v2"
    else:
        version = "v3" if max(positions) >= 32 else "v1"
    details = {"version": version, "max_frames": max(positions)}
    return Found(path, ModelType.MOTION_MODULE, Base.SD_1, details)


def _as_z_image(path: Path, header: Header) -> Found | None:
    parts = {key.split(".")[0] for key in header.shapes}
    if parts & {"control_layers", "control_all_x_embedder", "control_noise_refiner"}:
        return Found(path, ModelType.CONTROLNET, Base.Z_IMAGE)
    names = {part for key in header.shapes for part in key.split(".")}
    if not names & {"cap_embedder", "context_refiner", "cap_pad_token"}:
        return None
    embedders = (re.search(r"all_x_embedder\.\d+-(\d+)\.", key) for key in header.shapes)
    sizes = sorted({int(match[1]) for match in embedders if match})
    base = Base.Z_IMAGE_VIDEO if len(sizes) > 1 else Base.Z_IMAGE
    return Found(path, ModelType.MAIN, base, {"f_patch_sizes": sizes})


# Keys that all have to be there, and what they are.
SIGNATURES: tuple[tuple[tuple[str, ...], ModelType, Base], ...] = (
    (("double_blocks.0.", "single_blocks.0.", "txt_in."), ModelType.MAIN, Base.HUNYUAN_VIDEO),
    (
        (
            "transformer_blocks.0.",
            "single_transformer_blocks.0.",
            "context_embedder.token_refiner.",
        ),
        ModelType.MAIN,
        Base.HUNYUAN_VIDEO,
    ),
    (("model.diffusion_model.input_blocks.", "time_stack."), ModelType.MAIN, Base.SVD),
    (("model.diffusion_model.input_blocks.", "cond_stage_model."), ModelType.MAIN, Base.SD_1),
    (("controlnet_down_blocks.", "controlnet_mid_block."), ModelType.CONTROLNET, Base.SD_1),
    (("control_model.input_blocks.",), ModelType.CONTROLNET, Base.SD_1),
    (("decoder.up_blocks.", "norm_out.gamma"), ModelType.VIDEO_VAE, Base.WAN),
    (("decoder.upsamples.", "encoder.downsamples."), ModelType.VIDEO_VAE, Base.WAN),
    (("encoder.conv_in.conv.", "decoder.up_blocks."), ModelType.VIDEO_VAE, Base.HUNYUAN_VIDEO),
    (("decoder.time_conv_out.",), ModelType.VIDEO_VAE, Base.SVD),
)


def _as_others(path: Path, header: Header) -> Found | None:
    def has(name: str) -> bool:
        return any(name in key for key in header.shapes)

    for names, kind, base in SIGNATURES:
        if all(map(has, names)):
            return Found(path, kind, base)
    return None
