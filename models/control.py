"""Control networks that an operator has put beside a model: what leads them, and whom they fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.catalog import Model
from models.probe import FAMILY_BASES, Base, ModelType, probe
from models.request import ControlKind
from models.source import Remote
from models.spec import WeightsDamaged, read_json
from models.weight_files import sha256_of_weights

# The denoiser's folder, and what a network and it have in common.
SAME_SIZES = {
    Base.Z_IMAGE: ("transformer", ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")),
    Base.SD_1: ("unet", ("in_channels", "block_out_channels", "layers_per_block")),
}


class ControlDoesNotFit(WeightsDamaged):
    """A control network is not made for the layers of the model, or for none that is run here."""


@dataclass(frozen=True, slots=True)
class ControlNet:
    """A network that reads a picture beside the denoiser, and says what to add to its layers.

    `ZImageControlNetModel`, `ControlNetModel` (arXiv:2302.05543) or `SparseControlNetModel`
    (arXiv:2311.16933), which is given some of the frames only. kinds: what it was trained on, which
    its files do not tell.
    """

    id: str
    folder: Path
    base: Base
    class_name: str
    kinds: tuple[ControlKind, ...]
    config: dict[str, Any]
    sha256: str
    size_bytes: int
    remote: Remote | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is told which of the frames its pictures are of."""
        return self.class_name == "SparseControlNetModel"

    @property
    def takes_latents(self) -> bool:
        """Whether its pictures go through the model's VAE first."""
        simplified = self.config.get("use_simplified_condition_embedding", True)
        return self.base is Base.Z_IMAGE or (self.is_sparse and simplified)

    @property
    def f_patch_sizes(self) -> tuple[int, ...] | None:
        """The temporal patches that it has layers for; None: it has nothing to do with them."""
        return tuple(self.config["all_f_patch_size"]) if self.base is Base.Z_IMAGE else None

    @property
    def default_scale(self) -> float:
        """Its publishers'."""
        return 0.75 if self.base is Base.Z_IMAGE else 1.0

    def misfit(self, model: Model) -> str | None:
        """Why it can't lead a model: it is for another kind, or for layers of other sizes; None if
        it can. An image model's layers are the video's.
        """
        base = FAMILY_BASES[model.manifest.family]
        if self.base is not base and (self.base, base) != (Base.Z_IMAGE, Base.Z_IMAGE_VIDEO):
            return f"it is for {self.base}, and {model.id} is {base}"
        part, keys = SAME_SIZES[self.base]
        config = read_json(model.folder / part / "config.json")
        for key in keys:
            if self.config.get(key) != config.get(key):
                return f"its {key} is {self.config.get(key)}, {model.id}'s {config.get(key)}"
        last_place = max(self.config.get("control_layers_places", [0]))
        if last_place >= config.get("n_layers", 1):
            return f"it has a say in layer {last_place} of {config.get('n_layers')}"
        return None

    def fits(self, model: Model) -> bool:
        """Whether it can lead the model."""
        return self.misfit(model) is None


def load_control_net(folder: Path, control_id: str, kinds: tuple[ControlKind, ...]) -> ControlNet:
    """Read what a folder in diffusers' layout is; NotRecognised, WeightsMissing, WeightsDamaged."""
    found = probe(folder)
    if found.type is not ModelType.CONTROLNET or not folder.is_dir():
        told = f"it is a {found.base} {found.type}, not a control network in diffusers' layout"
        raise WeightsDamaged(str(folder), told)
    config = read_json(folder / "config.json")
    if config.get("global_pool_conditions"):
        raise ControlDoesNotFit(str(folder), "global_pool_conditions is not supported")
    files = sorted(folder.glob("*.safetensors"))
    return ControlNet(
        id=control_id,
        folder=folder,
        base=found.base,
        class_name=found.details["class"],
        kinds=kinds,
        config=config,
        sha256=sha256_of_weights(folder),
        size_bytes=sum(file.stat().st_size for file in files),
    )
