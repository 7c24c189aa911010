"""What the OpenAPI document says of bodies that are read by hand, and of refusals."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from media.renditions import MEDIA_TYPES
from models.request import CacheBy, ControlKind, Scheduler

STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
FILE = {"type": "string", "format": "binary"}
FILES = {"type": "array", "items": FILE}
BOX = {
    "type": "object",
    "required": ["x", "y", "width", "height"],
    "properties": dict.fromkeys(("x", "y", "width", "height"), INTEGER),
}

SETTINGS: dict[str, Any] = {
    "prompt": STRING,
    "negative_prompt": STRING,
    "model": STRING,
    "seconds": STRING,
    "size": {"type": "string", "example": "64x64"},
    "width": INTEGER,
    "height": INTEGER,
    "num_frames": INTEGER,
    "fps": INTEGER,
    "f_patch_size": INTEGER,
    "num_steps": INTEGER,
    "guidance_scale": NUMBER,
    "flow_shift": NUMBER,
    "motion_strength": NUMBER,
    "min_guidance_scale": NUMBER,
    "motion_bucket_id": INTEGER,
    "noise_aug_strength": NUMBER,
    "true_cfg_scale": NUMBER,
    "loras": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": STRING, "weight": NUMBER},
        },
    },
    "control": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"type": "string", "enum": list(ControlKind)},
            "scale": {**NUMBER, "minimum": 0, "maximum": 2},
            "start": {**NUMBER, "minimum": 0, "maximum": 1},
            "end": {**NUMBER, "minimum": 0, "maximum": 1},
            "preprocess": {"type": "boolean"},
            "frames": {"type": "array", "items": INTEGER},
            "image": STRING,
            "video": STRING,
        },
    },
    "denoising_end": {**NUMBER, "minimum": 0, "maximum": 1},
    "regions": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["prompt"],
            "properties": {
                "prompt": STRING,
                "box": BOX,
                "frames": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 2},
                "mask": {"type": ["string", "integer"]},
            },
        },
    },
    "prompt_schedule": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["frame", "prompt"],
            "properties": {"frame": INTEGER, "prompt": STRING},
        },
    },
    "seed_variance": {
        "type": "object",
        "properties": {"strength": NUMBER, "percent": NUMBER, "per_frame": {"type": "boolean"}},
    },
    "step_cache": {
        "type": "object",
        "required": ["threshold"],
        "properties": {
            "by": {"type": "string", "enum": list(CacheBy)},
            "threshold": {**NUMBER, "exclusiveMinimum": 0, "maximum": 1},
            "warm_up": {**INTEGER, "minimum": 1, "maximum": 200},
        },
    },
    "free_noise": {
        "type": "object",
        "properties": {
            name: {**INTEGER, "minimum": least, "maximum": 128}
            for name, least in (("context_length", 2), ("context_stride", 1))
        },
    },
    "cfg_skip_ratio": {**NUMBER, "minimum": 0, "maximum": 1},
    "scheduler": {"type": "string", "enum": list(Scheduler)},
    "seed": INTEGER,
    "tags": {"type": "array", "items": STRING},
    "user": STRING,
}


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": STRING,
                "type": STRING,
                "param": {"type": ["string", "null"]},
                "code": STRING,
            },
        }
    },
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """That a route may answer with these statuses and the error envelope."""
    content = {"application/json": {"schema": ERROR}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


def _file(*kinds: str) -> dict[str, Any]:
    return {"content": {kind: {"schema": FILE} for kind in kinds}}


RENDITIONS = _file(*MEDIA_TYPES.values())
# Starlette answers for a file's ranges, in plain text what is wrong with them.
CONTENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file", **RENDITIONS},
    206: {"description": "A part of it", **RENDITIONS},
    400: {
        "description": "Not a variant, or not a range",
        "content": {"application/json": {"schema": ERROR}, "text/plain": {"schema": STRING}},
    },
    416: {"description": "No such part", "content": {"text/plain": {"schema": STRING}}},
}
SYNC_ANSWERS: dict[int | str, dict[str, Any]] = {
    **CONTENT_ANSWERS,
    200: {"description": "The finished MP4", **_file("video/mp4")},
    206: {"description": "A part of it", **_file("video/mp4")},
}
EVENT = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": STRING,
        "event": {"type": "string", "enum": ["progress", "completed", "failed"]},
        "data": STRING,
    },
}
EVENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document, without the 422 that FastAPI would answer with and that here is a 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _body(required: tuple[str, ...], **files: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": list(required),
        "properties": {**SETTINGS, **files},
    }
    kinds = ("multipart/form-data", "application/json")
    return {
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": schema} for kind in kinds},
        }
    }


REFERENCES = {"control_reference": FILE, "region_masks": FILES}
CREATE_BODY = _body(("prompt",), input_reference=FILE, crop=BOX, **REFERENCES)
REMIX_BODY = CREATE_BODY
DERIVE_BODY = _body(
    ("prompt", "video"),
    video=FILE,
    strength=NUMBER,
    denoising_start=NUMBER,
    mask=FILE,
    **REFERENCES,
)
