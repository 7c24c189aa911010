"""Where videos, start images and checkpoints lie: one contract, and a local directory for it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class ObjectNotFound(Exception):
    """No object has that key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"no object {self.key!r}"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's key and length."""

    key: str
    size_bytes: int


class ObjectStore(Protocol):
    """Whole objects under slash-separated keys. Reading or asking for a missing one raises
    ObjectNotFound; deleting it does nothing.
    """

    def put(self, key: str, content: bytes | Path) -> ObjectInfo:
        """Store bytes or move a file in."""
        ...

    def get(self, key: str) -> bytes:
        """All of an object."""
        ...

    def range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start..end, both included."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Its length."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key begins with prefix, by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove it if it is there."""
        ...


class LocalObjectStore:
    """Objects as files under one directory; a put appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / ".incoming"

    def put(self, key: str, content: bytes | Path) -> ObjectInfo:
        """Store bytes or move a file in, replacing what was there; on disk when it returns."""
        target = self.path(key)
        self.incoming.mkdir(parents=True, exist_ok=True)
        partial = self.incoming / uuid.uuid4().hex
        if isinstance(content, Path):
            shutil.move(content, partial)
        else:
            partial.write_bytes(content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, target)
        return ObjectInfo(key, target.stat().st_size)

    def get(self, key: str) -> bytes:
        """All of an object."""
        return self._existing(key).read_bytes()

    def range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start..end, both included, as in HTTP; shorter where the object ends."""
        with self._existing(key).open("rb") as file:
            file.seek(start)
            return file.read(end - start + 1)

    def head(self, key: str) -> ObjectInfo:
        """The object's length."""
        return ObjectInfo(key, self._existing(key).stat().st_size)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key begins with prefix, by key."""
        for path in sorted(self.root.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if path.is_file() and self.incoming not in path.parents and key.startswith(prefix):
                yield ObjectInfo(key, path.stat().st_size)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """The file of a key; ValueError for a key that would leave the directory."""
        path = self.root / key
        if not key or key != os.path.normpath(key) or key.startswith(("/", "..", ".incoming")):
            raise ValueError(f"not an object key: {key!r}")
        return path

    def _existing(self, key: str) -> Path:
        path = self.path(key)
        if not path.is_file():
            raise ObjectNotFound(key)
        return path
