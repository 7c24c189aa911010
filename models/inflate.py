"""Makes a video checkpoint of a Z-Image image checkpoint: temporal patches without training.

A token of k latent frames sees their mean and answers the same for each of them, so that a static
clip is what the image model makes of its frame; nothing in it has learnt to move.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

from models.catalog import load_model
from models.probe import Base, ModelType, NotRecognised, probe
from models.published_manifest import Z_IMAGE, Z_IMAGE_DEFAULTS, Z_IMAGE_VARIANTS
from models.request import ModelFamily
from models.spec import WeightsDamaged
from models.weight_files import check_sums

F_PATCH_SIZES = (1, 2, 4)
COPIED = ("vae", "text_encoder", "tokenizer", "scheduler")


def inflate(source: Path, target: Path, licence: str) -> None:
    """Write a deployable folder, whole or not at all; FileExistsError, NotRecognised,
    WeightsDamaged.
    """
    found = probe(source)
    if (found.type, found.base) != (ModelType.MAIN, Base.Z_IMAGE) or not source.is_dir():
        raise NotRecognised(source, "no folder of a Z-Image image model")
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        inflate_transformer(_load(source / "transformer")).save_pretrained(partial / "transformer")
        for part in COPIED:
            shutil.copytree(source / part, partial / part)
        manifest = _manifest(found.details.get("variant", "base"), licence, check_sums(partial))
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        load_model(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def inflate_transformer(
    image: ZImageTransformer2DModel, sizes: Sequence[int] = F_PATCH_SIZES
) -> ZImageTransformer2DModel:
    """The same transformer with an embedder and a last layer for each temporal patch size.

    A patch's values are in the order (frame, row, column, channel).
    """
    (patch,) = image.config.all_patch_size
    config = {
        **image.config,
        "all_patch_size": (patch,) * len(sizes),
        "all_f_patch_size": tuple(sizes),
    }
    with torch.device("meta"):
        video = ZImageTransformer2DModel.from_config(config)
    state = image.state_dict()
    for size in sizes:
        for name in list(image.state_dict()):
            kept = name.replace(f".{patch}-1.", f".{patch}-{size}.")
            weight = state[name]
            if name.startswith("all_x_embedder.") and name.endswith("weight"):
                state[kept] = weight.repeat(1, size) / size
            elif name.startswith("all_final_layer.") and ".linear." in name:
                state[kept] = weight.repeat(size, *[1] * (weight.dim() - 1))
            elif name.startswith(("all_x_embedder.", "all_final_layer.")):
                state[kept] = weight.clone()
    video.load_state_dict(state, strict=True, assign=True)
    return video


def _load(folder: Path) -> Any:
    """In the type that it is stored in."""
    model, report = ZImageTransformer2DModel.from_pretrained(
        folder,
        torch_dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        keys = [*report["missing_keys"], *report["unexpected_keys"]]
        raise WeightsDamaged(str(folder), f"missing or unexpected keys: {', '.join(keys[:5])}")
    if list(model.config.all_f_patch_size) != [1]:
        raise NotRecognised(folder, "its transformer has temporal patches already")
    return model


def _manifest(variant: str, licence: str, sha256: dict[str, str]) -> dict[str, Any]:
    size = {"num_frames": 16, "width": 1280, "height": 720, "f_patch_size": 1}
    return {
        "family": ModelFamily.Z_IMAGE_VIDEO,
        "description": f"Z-Image {variant} with untrained temporal patches: it does not move",
        "trained": False,
        "min_frames": 1,
        **Z_IMAGE,
        "licence": licence,
        "max_frames": 129,
        "defaults": {**Z_IMAGE_DEFAULTS, **size, **Z_IMAGE_VARIANTS[variant]},
        "sha256": sha256,
    }
