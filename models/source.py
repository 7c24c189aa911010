"""Where a checkpoint comes from, if not from this machine: an S3 bucket, or a model hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

COMMIT = re.compile(r"[0-9a-f]{40}")
S3_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.+)")
HUB_URL = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<path>.+))?"
)


class SourceUnavailable(Exception):
    """A bucket or a hub does not give what is asked of it."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True, slots=True)
class S3Source:
    """An object, or all whose keys are below the key's."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of a hub that speaks Hugging Face's protocol, or a folder or a file of it.

    revision: a commit, a tag or a branch; None: the newest of the main branch.
    """

    repository: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repository}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def is_pinned(self) -> bool:
        """Whether it is the same to every machine and at any time."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


Source = S3Source | HubSource


def check_names(source: Source, names: Iterable[str]) -> None:
    """SourceUnavailable for a file that would lie outside of the folder that it is put into."""
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise SourceUnavailable(str(source), f"{name!r} would lie outside of its folder")


def parse_source(text: str) -> Source | None:
    """None for a path of this machine; ValueError for what is neither that nor a source."""
    if "://" not in text:
        return None
    if any(part in ("", ".", "..") for part in text.split("://", 1)[1].rstrip("/").split("/")):
        raise ValueError(f"{text}: a part of it is empty, '.' or '..'")
    if match := S3_URL.fullmatch(text.rstrip("/")):
        return S3Source(match["bucket"], match["key"])
    if match := HUB_URL.fullmatch(text.rstrip("/")):
        return HubSource(match["repository"], match["revision"], match["path"] or "")
    raise ValueError(f"{text}: neither a path, s3://bucket/key nor hf://owner/name@revision[/path]")


@dataclass(frozen=True, slots=True)
class Remote:
    """A source, and the folder of each machine that its files are put into."""

    source: Source
    folder: Path

    @property
    def path(self) -> Path:
        """What was asked for in there: a folder, or one file."""
        if isinstance(self.source, HubSource):
            return self.folder / self.source.path
        name = self.source.key.rsplit("/", 1)[-1]
        return self.folder / name if name.endswith(".safetensors") else self.folder


def in_cache(source: Source, cache: Path) -> Remote:
    """The source's place below a cache, which no other has."""
    return Remote(source, cache / quote(str(source), safe="@"))
