"""Weight files as they lie on disk: whole, complete, safetensors only; and their check sums."""

import hashlib
from pathlib import Path

from models.safetensors_header import read_header
from models.spec import WeightsDamaged, WeightsMissing, read_json

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def check_weight_files(folder: Path) -> None:
    """Nothing below the folder is pickled, each safetensors file is whole, and every one that an
    index names is there; WeightsDamaged, WeightsMissing.
    """
    for path in sorted(folder.rglob("*")):
        refuse_pickle(path)
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.name.endswith(".safetensors.index.json"):
            for name in sorted({*map(str, read_json(path).get("weight_map", {}).values())}):
                if not (path.parent / name).is_file():
                    raise WeightsMissing(str(path.parent / name))


def refuse_pickle(path: Path) -> None:
    """WeightsDamaged for a file that could run code when it is read."""
    if path.suffix in PICKLE_SUFFIXES:
        raise WeightsDamaged(str(path), "pickled weights are refused; use safetensors")


def sha256_of(path: Path) -> str:
    """Of the file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(path: Path) -> str:
    """Of a safetensors file, or of those in a folder one after the other."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return " ".join(map(sha256_of, files))


def check_sums(folder: Path) -> dict[str, str]:
    """Of every file of every component, by relative name, as a manifest has them."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}
