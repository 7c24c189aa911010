"""Where videos, start images and checkpoints lie: one contract, and a local directory for it."""

import contextlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


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

    def delete_unfinished(self, min_age_s: float) -> None:
        """Remove what puts that were killed have left, if it is at least that old."""
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
        _sync(partial)
        size_bytes = partial.stat().st_size
        self._make_folder(target.parent)
        os.replace(partial, target)
        _sync(target.parent)
        return ObjectInfo(key, size_bytes)

    def get(self, key: str) -> bytes:
        """All of an object."""
        with self._open(key) as file:
            return file.read()

    def range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start..end, both included, as in HTTP; shorter where the object ends."""
        with self._open(key) as file:
            file.seek(start)
            return file.read(end - start + 1)

    def head(self, key: str) -> ObjectInfo:
        """The object's length."""
        with self._open(key) as file:
            return ObjectInfo(key, os.fstat(file.fileno()).st_size)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key begins with prefix, by key; what is deleted meanwhile may be missing.

        Only the folder that the prefix names is read.
        """
        folder = self.root / prefix.rpartition("/")[0]
        for path in sorted(folder.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix) or self.incoming in path.parents:
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(key, status.st_size)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        self.path(key).unlink(missing_ok=True)

    def delete_unfinished(self, min_age_s: float) -> None:
        """Remove what puts that were killed have left, if it is at least that old."""
        for partial in self.incoming.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # its put has come to its end
                # By when it was moved in: a moved file keeps the time of its last write.
                if time.time() - partial.stat().st_ctime >= min_age_s:
                    partial.unlink()

    def path(self, key: str) -> Path:
        """The file of a key; ValueError for a key that would leave the directory."""
        path = self.root / key
        if not key or key != os.path.normpath(key) or key.startswith(("/", "..", ".incoming")):
            raise ValueError(f"not an object key: {key!r}")
        return path

    def _open(self, key: str) -> BinaryIO:
        try:
            return self.path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectNotFound(key) from None

    def _make_folder(self, folder: Path) -> None:
        """With its parents, each on disk in the one above."""
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync(folder.parent)


def _sync(path: Path) -> None:
    """What the file holds, or which names the folder has, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
