"""Puts checkpoints that lie elsewhere into this machine's cache, whole or not at all."""

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from models.catalog import Model, read_manifest, write_manifest
from models.probe import NotRecognised
from models.published_manifest import published_manifest
from models.source import HubSource, Remote, S3Source
from models.spec import WeightsDamaged
from models.weight_files import check_weight_files, sha256_of_weights

CHANGED = "it has changed since it was deployed"


def fetch(remote: Remote) -> None:
    """Have a source's files in their folder; at once, if they are there.

    Whoever is killed in between leaves what it has brought, and the next one goes on with it; of
    several at a time one does, and the others wait. A pipeline that its publishers have not made
    for us gets the manifest that `mutoscope models manifest` would write.
    SourceUnavailable, WeightsMissing, WeightsDamaged.
    """
    folder = remote.folder
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        partial = replace(remote, folder=folder.with_name(f"{folder.name}.partial"))
        _bring(partial)
        check_weight_files(partial.folder)
        _add_manifest(partial.path)
        partial.folder.replace(folder)


def fetch_parts(model: Model) -> None:
    """Have on this machine what a deployed model is made of, as it was when it was deployed."""
    if model.remote is not None:
        fetch(model.remote)
        found = read_manifest(model.folder)
        if found.told_by_publisher() != model.manifest.told_by_publisher():
            raise WeightsDamaged(str(model.remote.source), CHANGED)
    for addition in model.additions:
        if addition.remote is not None:
            fetch(addition.remote)
            if sha256_of_weights(addition.remote.path) != addition.sha256:
                raise WeightsDamaged(str(addition.remote.source), CHANGED)


def _bring(remote: Remote) -> None:
    match remote.source:
        case S3Source():
            from models.s3_source import fetch_s3

            fetch_s3(remote.source, remote.folder)
        case HubSource():
            from models.hub_source import fetch_hub

            fetch_hub(remote.source, remote.folder)
        case _:
            assert_never(remote.source)


def _add_manifest(folder: Path) -> None:
    if (folder / "model_index.json").is_file() and not (folder / "manifest.json").exists():
        with contextlib.suppress(NotRecognised):  # only a part of what a family needs
            write_manifest(folder, published_manifest(folder))


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # gone with the process, however it ends
        yield
