"""The manifest of a checkpoint as its publishers' own scripts run it.

Sources: AnimateDiff's configs/prompts, Stability's sampling/svd*.yaml and simple_video_sample.py,
Tencent's hyvideo/config.py, Tongyi's Z-Image README, and each one's licence.
"""

from pathlib import Path
from typing import Any

from models.probe import Base, ModelType, NotRecognised, probe
from models.request import ModelFamily
from models.spec import WeightsDamaged, has_whole_motion_unet, read_json
from models.weight_files import check_sums

AREA_720P = 1280 * 720
Z_IMAGE: dict[str, Any] = {
    "licence": "Apache-2.0",
    "vae": "kl",
    "max_text_tokens": 512,
    "max_frames": 1,  # it is an image model
    "max_side": 1920,
    "max_area": 1920 * 1088,
    "decode_chunk_frames": 4,
}
Z_IMAGE_DEFAULTS: dict[str, Any] = {"num_frames": 1, "width": 1024, "height": 1024, "fps": 8}
# The publishers count guidance from 0.
Z_IMAGE_VARIANTS = {
    "turbo": {"num_steps": 9, "guidance_scale": 1.0},
    "base": {"num_steps": 50, "guidance_scale": 5.0},
}
SVD = {
    "licence": "Stable Video Diffusion Non-Commercial Community License",
    "commercial_use": False,
    "vae": "kl-temporal",
    "max_text_tokens": 77,
    "max_side": 1024,
    "max_area": 1024 * 1024,
    "decode_chunk_frames": 14,
}
SVD_DEFAULTS = {
    "width": 1024,
    "height": 576,
    "fps": 6,
    "motion_bucket_id": 127,
    "noise_aug_strength": 0.02,
}
PUBLISHED: dict[ModelFamily, dict[str, Any]] = {
    ModelFamily.ANIMATEDIFF: {
        "licence": "Apache-2.0; CreativeML Open RAIL-M for Stable Diffusion 1.5",
        "vae": "kl",
        "max_text_tokens": 77,
        "max_frames": 32,
        "max_side": 768,
        "max_area": 768 * 768,
        "defaults": {
            "num_frames": 16,
            "width": 512,
            "height": 512,
            "fps": 8,
            "num_steps": 25,
            "guidance_scale": 8.0,
        },
    },
    ModelFamily.SVD: {
        **SVD,
        "max_frames": 14,
        "defaults": {
            **SVD_DEFAULTS,
            "num_frames": 14,
            "num_steps": 25,
            "min_guidance_scale": 1.0,
            "guidance_scale": 2.5,
        },
    },
    ModelFamily.SVD_XT: {
        **SVD,
        "max_frames": 25,
        "defaults": {
            **SVD_DEFAULTS,
            "num_frames": 25,
            "num_steps": 30,
            "min_guidance_scale": 1.5,
            "guidance_scale": 3.0,
        },
    },
    ModelFamily.HUNYUAN_VIDEO: {
        "licence": "Tencent Hunyuan Community License",
        "territory_exclusions": ["EU", "GB", "KR"],
        "vae": "hunyuan",
        "max_text_tokens": 256,
        "max_frames": 129,
        "max_side": 1280,
        "max_area": AREA_720P,
        "defaults": {
            "num_frames": 129,
            "width": 1280,
            "height": 720,
            "fps": 24,
            "num_steps": 50,
            "guidance_scale": 6.0,
        },
    },
}


def published_manifest(folder: Path) -> dict[str, Any]:
    """Of a pipeline's folder in diffusers' layout, with the check sums of its files.

    NotRecognised, or WeightsDamaged for a folder that has one already.
    """
    if (folder / "manifest.json").exists():
        raise WeightsDamaged(str(folder / "manifest.json"), "it is there already")
    found = probe(folder)
    if found.type is not ModelType.MAIN or "class" not in found.details:
        raise NotRecognised(folder, f"a {found.base} {found.type}, not a whole pipeline")
    family, told = _family_of(folder, found.base, found.details)
    return {
        "family": family,
        "description": f"{family}, as published",
        "trained": True,
        "min_frames": 1,
        **told,
        "sha256": check_sums(folder),
    }


def _family_of(folder: Path, base: Base, details: Any) -> tuple[ModelFamily, dict[str, Any]]:
    match base:
        case Base.SVD:
            family = ModelFamily(details["family"])
        case Base.HUNYUAN_VIDEO:
            family = ModelFamily.HUNYUAN_VIDEO
            if read_json(folder / "transformer" / "config.json").get("guidance_embeds") is False:
                defaults = {**PUBLISHED[family]["defaults"], "guidance_scale": 1.0}
                return family, {**PUBLISHED[family], "defaults": defaults}
        case Base.SD_1:
            if not (folder / "motion_adapter").is_dir() and not has_whole_motion_unet(folder):
                raise NotRecognised(folder, "Stable Diffusion without a motion_adapter beside it")
            family = ModelFamily.ANIMATEDIFF
        case Base.Z_IMAGE:
            family = ModelFamily.Z_IMAGE_VIDEO
            defaults = {**Z_IMAGE_DEFAULTS, **Z_IMAGE_VARIANTS[details["variant"]]}
            return family, {**Z_IMAGE, "defaults": defaults}
        case _:
            raise NotRecognised(folder, f"no family is made of {base}")
    return family, PUBLISHED[family]
