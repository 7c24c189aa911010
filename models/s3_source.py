"""Brings checkpoints from an S3 bucket, whose access is configured as boto3's always is."""

import base64
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import TypeAdapter, ValidationError

from models.source import S3Source, SourceUnavailable, check_names
from models.spec import WeightsDamaged, read_json
from models.weight_files import refuse_pickle, sha256_of

logger = logging.getLogger(__name__)

SUMS = TypeAdapter(dict[str, str])
READ_BYTES = 1 << 20
# In a row that bring nothing new.
MAX_ATTEMPTS = 5


def fetch_s3(source: S3Source, folder: Path) -> None:
    """Bring every object into the folder, going on with what is there of them.

    Each is compared with its sum in manifest.json, or with the one that S3 keeps of it; one that
    has neither is refused. SourceUnavailable, WeightsDamaged.
    """
    client = boto3.client("s3")
    try:
        objects = _list(client, source)
        for name in objects:
            refuse_pickle(Path(f"{source}/{name}"))
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            if str(file.relative_to(folder)) not in objects:
                file.unlink()  # of an earlier try; it is gone from the bucket
        sums: Mapping[str, str] = {}
        for name in sorted(objects, key=lambda name: name != "manifest.json"):
            _bring(client, source, objects[name], folder / name, sums.get(name))
            if name == "manifest.json":
                sums = _sums_of(folder / name)
    except (BotoCoreError, ClientError) as error:
        raise SourceUnavailable(str(source), str(error)) from error


def _sums_of(manifest: Path) -> dict[str, str]:
    try:
        return SUMS.validate_python(read_json(manifest).get("sha256", {}))
    except ValidationError as error:
        raise WeightsDamaged(str(manifest), f"sha256: {error.errors()[0]['msg']}") from None


def _list(client: Any, source: S3Source) -> dict[str, str]:
    """Keys by their names in the folder; SourceUnavailable if there are none."""
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=source.bucket, Prefix=source.key
    )
    keys: Iterable[str] = (entry["Key"] for page in pages for entry in page.get("Contents", []))
    objects = {}
    for key in keys:
        if key == source.key:
            objects[key.rsplit("/", 1)[-1]] = key
        elif key.startswith(f"{source.key}/") and not key.endswith("/"):
            objects[key.removeprefix(f"{source.key}/")] = key
    if not objects:
        raise SourceUnavailable(str(source), "there is nothing")
    check_names(source, objects)
    return objects


def _bring(client: Any, source: S3Source, key: str, file: Path, sha256: str | None) -> None:
    """One object; what is already in the file is of it, or the sum will tell."""
    url = f"s3://{source.bucket}/{key}"
    head = client.head_object(Bucket=source.bucket, Key=key, ChecksumMode="ENABLED")
    file.parent.mkdir(parents=True, exist_ok=True)
    attempts = 0
    while (there := file.stat().st_size if file.exists() else 0) < head["ContentLength"]:
        logger.info("%s: %d of %d bytes", url, there, head["ContentLength"])
        try:
            _go_on(client, source.bucket, key, head["ETag"], file, there)
        except (BotoCoreError, OSError) as error:
            attempts = 1 if file.exists() and file.stat().st_size > there else attempts + 1
            if attempts >= MAX_ATTEMPTS:
                raise SourceUnavailable(url, str(error)) from error
    if not head["ContentLength"]:
        file.touch()
    reason = _difference(file, sha256, head)
    if reason is not None:
        file.unlink()
        raise WeightsDamaged(url, reason)


def _go_on(client: Any, bucket: str, key: str, etag: str, file: Path, first_byte: int) -> None:
    """Append what the file lacks, as long as the object is still the same."""
    asked = {"Range": f"bytes={first_byte}-"} if first_byte else {}
    answer = client.get_object(Bucket=bucket, Key=key, IfMatch=etag, **asked)
    with file.open("ab") as out:
        for part in answer["Body"].iter_chunks(READ_BYTES):
            out.write(part)


def _difference(file: Path, sha256: str | None, head: Mapping[str, Any]) -> str | None:
    """What is wrong with a file; None if it is what it should be."""
    if sha256 is not None:
        return None if sha256_of(file) == sha256 else "its SHA-256 is not the manifest's"
    if "ChecksumSHA256" in head and head.get("ChecksumType") == "FULL_OBJECT":
        kept = base64.b64decode(head["ChecksumSHA256"]).hex()
        return None if sha256_of(file) == kept else "its SHA-256 is not the one that S3 keeps"
    etag = head["ETag"].strip('"')
    if "-" in etag or head.get("ServerSideEncryption", "AES256") != "AES256":  # no MD5 then
        return "no check sum is known of it: list it in manifest.json, or upload it with one"
    with file.open("rb") as content:
        md5 = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return None if md5 == etag else "its MD5 is not the one that S3 keeps"
