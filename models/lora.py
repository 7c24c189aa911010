"""LoRA files that an operator has put beside a model: what they are for, and who asks for which."""

from dataclasses import dataclass
from pathlib import Path

from models.catalog import Model
from models.probe import FAMILY_BASES, Base, ModelType, probe
from models.source import Remote
from models.spec import WeightsDamaged
from models.weight_files import sha256_of


class LoraDoesNotFit(WeightsDamaged):
    """A LoRA has keys for layers that the model does not have, or for none at all."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A file of low-rank changes to a denoiser's layers (Hu et al., arXiv:2106.09685)."""

    id: str
    path: Path
    base: Base
    sha256: str
    size_bytes: int
    remote: Remote | None = None

    def fits(self, model: Model) -> bool:
        """Whether it was made for a model of this kind; an image model's layers are the video's."""
        base = FAMILY_BASES[model.manifest.family]
        return self.base is base or (self.base, base) == (Base.Z_IMAGE, Base.Z_IMAGE_VIDEO)


def load_lora(path: Path, lora_id: str) -> Lora:
    """Read what a file is; NotRecognised, WeightsDamaged if it is something else."""
    found = probe(path)
    if found.type is not ModelType.LORA:
        raise WeightsDamaged(str(path), f"it is a {found.base} {found.type}, not a LoRA")
    return Lora(lora_id, path, found.base, sha256_of(path), path.stat().st_size)
