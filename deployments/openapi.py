"""What the OpenAPI document says of bodies that are read by hand, and of refusals."""

from http import HTTPStatus
from typing import Any

STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
FILE = {"type": "string", "format": "binary"}
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
    "seed": INTEGER,
    "tags": {"type": "array", "items": STRING},
    "user": STRING,
}
CROP = {
    "type": "object",
    "required": ["x", "y", "width", "height"],
    "properties": dict.fromkeys(("x", "y", "width", "height"), INTEGER),
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


CREATE_BODY = _body(("prompt",), input_reference=FILE, crop=CROP)
REMIX_BODY = _body(("prompt",), input_reference=FILE, crop=CROP)
DERIVE_BODY = _body(("prompt", "video"), video=FILE, strength=NUMBER)
