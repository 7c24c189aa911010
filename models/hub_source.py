"""Brings checkpoints from a model hub: Hugging Face's, or the one that HF_ENDPOINT names."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from models.source import HubSource, SourceUnavailable, check_names
from models.spec import WeightsDamaged
from models.weight_files import sha256_of

logger = logging.getLogger(__name__)

# What a checkpoint in diffusers' layout is made of.
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
# Published beside the weights that are loaded here, in other types or of other states.
VARIANTS = (".fp16.", ".bf16.", ".non_ema.", ".ema.")


def pin(source: HubSource) -> HubSource:
    """The same, of the commit that its revision is now; SourceUnavailable."""
    return replace(source, revision=_ask(source).sha)


def fetch_hub(source: HubSource, folder: Path) -> None:
    """Bring the safetensors and what belongs to them into the folder, going on with what is there.

    Each file is compared with the sum that the hub keeps of it; pickles stay where they are.
    SourceUnavailable, WeightsDamaged.
    """
    info = _ask(source)
    files = {
        entry.rfilename: entry for entry in info.siblings if _is_wanted(source, entry.rfilename)
    }
    check_names(source, files)
    if not files:
        raise SourceUnavailable(str(source), "there are no safetensors")
    logger.info("%s: %d files of the commit %s", source, len(files), info.sha)
    for name, entry in files.items():
        url = f"hf://{source.repository}@{info.sha}/{name}"
        file = folder / name
        try:
            _bring(source.repository, info.sha, name, file, entry.size)
        except (OSError, httpx.HTTPError) as error:
            raise SourceUnavailable(url, str(error)) from error
        if not _is_right(file, entry):
            file.unlink()
            raise WeightsDamaged(url, "its check sum is not the one that the hub keeps")


def _bring(repository: str, commit: str, name: str, file: Path, size_bytes: int) -> None:
    """Append what the file lacks. The library's own downloads begin each file anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out:
        if out.tell() < size_bytes:
            http_get(
                hf_hub_url(repository, name, revision=commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=size_bytes,
            )


def _ask(source: HubSource) -> Any:
    """What the repository is at the revision."""
    try:
        return HfApi().model_info(source.repository, revision=source.revision, files_metadata=True)
    except (OSError, httpx.HTTPError) as error:
        raise SourceUnavailable(str(source), str(error)) from error


def _is_wanted(source: HubSource, name: str) -> bool:
    """Of a pipeline the files in its components' folders: whole checkpoints of other programs lie
    beside those.
    """
    if source.path.endswith(".safetensors"):
        return name == source.path
    if source.path and not name.startswith(f"{source.path}/"):
        return False
    inner = name.removeprefix(f"{source.path}/") if source.path else name
    if not inner.endswith(SUFFIXES) or any(variant in inner for variant in VARIANTS):
        return False
    return source.path != "" or "/" in inner or not inner.endswith(".safetensors")


def _is_right(file: Path, entry: Any) -> bool:
    """By Git's own sum of small files, the SHA-256 of large ones."""
    if entry.lfs is not None:
        return sha256_of(file) == entry.lfs.sha256
    content = file.read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return digest.hexdigest() == entry.blob_id
