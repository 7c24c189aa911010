"""The files that a finished job leaves, and where they lie."""

from enum import StrEnum

from media.object_store import ObjectStore


class Rendition(StrEnum):
    """What `variant` names in the Videos API."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"


SUFFIXES = {Rendition.VIDEO: "mp4", Rendition.THUMBNAIL: "webp", Rendition.SPRITESHEET: "jpg"}
MEDIA_TYPES = {
    Rendition.VIDEO: "video/mp4",
    Rendition.THUMBNAIL: "image/webp",
    Rendition.SPRITESHEET: "image/jpeg",
}


def rendition_key(job_id: str, rendition: Rendition) -> str:
    """Where one of a job's files lies in the object store."""
    return f"videos/{job_id}.{SUFFIXES[rendition]}"


def delete_renditions(store: ObjectStore, job_id: str) -> None:
    """Remove all of a job's files, those that never came to be included."""
    for rendition in Rendition:
        store.delete(rendition_key(job_id, rendition))
