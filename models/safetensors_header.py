"""Reads what a safetensors file says of itself, without reading a tensor."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.spec import WeightsDamaged


@dataclass(frozen=True, slots=True)
class Header:
    """The shapes of its tensors by name, and the metadata that its maker left."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """WeightsDamaged unless it parses and the last tensor ends where the file does."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightsDamaged(str(path), "too short for a safetensors header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > size_bytes - 8:
            raise WeightsDamaged(str(path), "its header is longer than the file")
        try:
            entries = json.loads(file.read(header_bytes))
            metadata = entries.pop("__metadata__", {})
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise WeightsDamaged(str(path), f"its header can't be read: {error}") from None
    if 8 + header_bytes + max(ends, default=0) != size_bytes:
        raise WeightsDamaged(str(path), "it is shorter or longer than its header says")
    return Header(shapes, metadata)
