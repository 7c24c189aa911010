"""Reads the body of a create request, JSON or multipart, into named fields and a start image."""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from deployments.config import LimitsConfig
from models.catalog import Model
from models.request import InvalidRequest, VideoRequest
from models.start_image import check_start_image

ALIASES = {
    "num_inference_steps": "num_steps",
    "steps": "num_steps",
    "numSteps": "num_steps",
    "numFrames": "num_frames",
    "fPatchSize": "f_patch_size",
    "guidanceScale": "guidance_scale",
    "negativePrompt": "negative_prompt",
    "startImage": "input_reference",
    "start_image": "input_reference",
    "input_reference[image_url]": "input_reference",
    "input_reference[]": "input_reference",
}
FIELDS = {
    "prompt",
    "negative_prompt",
    "model",
    "seconds",
    "size",
    "width",
    "height",
    "num_frames",
    "fps",
    "f_patch_size",
    "num_steps",
    "guidance_scale",
    "seed",
    "input_reference",
}
DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,(?P<content>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CreateBody:
    """The given fields under their own names, model and start image apart."""

    model: str | None
    fields: dict[str, Any]
    start_image: bytes | None

    def resolve(self, model: Model, limits: LimitsConfig) -> VideoRequest:
        """The complete request for a model; InvalidRequest names the faulty field."""
        _check_texts(self.fields, limits)
        fields = self.with_size_and_frames(model.manifest.defaults.fps)
        if self.start_image is not None:
            check_start_image(
                self.start_image, max_pixels=limits.max_image_pixels, param="input_reference"
            )
        return model.resolve(fields)

    def with_size_and_frames(self, default_fps: int) -> dict[str, Any]:
        """The fields, size as width and height, seconds as num_frames; InvalidRequest."""
        fields = dict(self.fields)
        for one, others in (("size", ("width", "height")), ("seconds", ("num_frames",))):
            for other in others:
                if one in fields and other in fields:
                    raise InvalidRequest(other, f"{one} and {other} exclude each other")
        if "size" in fields:
            fields["width"], fields["height"] = _parse_size(fields.pop("size"))
        if "seconds" in fields:
            seconds = _parse_seconds(fields.pop("seconds"))
            fields["num_frames"] = round(seconds * _parse_fps(fields.get("fps", default_fps)))
        return fields


async def read_create_body(request: Request) -> CreateBody:
    """Parse the body; InvalidRequest for what is malformed or unknown."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        given = await _read_form(request)
    else:
        given = await _read_json(request)
    fields: dict[str, Any] = {}
    for name, value in given.items():
        field = ALIASES.get(name, name)
        if field not in FIELDS:
            raise InvalidRequest(name, f"unknown field {name!r}")
        if field in fields:
            raise InvalidRequest(name, f"{field} is given twice")
        if value is not None:
            fields[field] = value
    model = fields.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise InvalidRequest("model", "model must be a string")
    start_image = _read_image(fields.pop("input_reference", None))
    return CreateBody(model, fields, start_image)


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(None, "the body is neither JSON nor multipart/form-data") from error
    if not isinstance(content, dict):
        raise InvalidRequest(None, "the body must be a JSON object")
    return content


async def _read_form(request: Request) -> dict[str, Any]:
    given: dict[str, Any] = {}
    try:
        async with request.form() as form:
            for name, value in form.multi_items():
                if name in given:
                    raise InvalidRequest(name, f"{name} is given twice")
                given[name] = await value.read() if isinstance(value, UploadFile) else value
    except HTTPException as error:
        raise InvalidRequest(None, f"malformed multipart body: {error.detail}") from error
    return given


def _read_image(value: Any) -> bytes | None:
    """The bytes of an uploaded file or of a data URL, also as {"image_url": ...}."""
    if isinstance(value, dict):
        if set(value) != {"image_url"}:
            raise InvalidRequest("input_reference", "input_reference takes only image_url")
        value = value["image_url"]
    if value is None or isinstance(value, bytes):
        return value
    match = DATA_URL.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidRequest(
            "input_reference", "input_reference must be a file or a base64 data URL of an image"
        )
    try:
        return base64.b64decode(match["content"], validate=True)
    except binascii.Error as error:
        raise InvalidRequest("input_reference", "input_reference is not valid base64") from error


def _check_texts(fields: dict[str, Any], limits: LimitsConfig) -> None:
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "prompt is required")
    for name in ("prompt", "negative_prompt"):
        text = fields.get(name, "")
        if not isinstance(text, str):
            raise InvalidRequest(name, f"{name} must be a string")
        if "\x00" in text:
            raise InvalidRequest(name, f"{name} must not contain NUL")
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise InvalidRequest(name, f"{name} is not valid Unicode")
        if len(text) > limits.max_prompt_chars:
            raise InvalidRequest(name, f"{name} is limited to {limits.max_prompt_chars} characters")
    if not fields["prompt"].strip():
        raise InvalidRequest("prompt", "prompt must not be empty")


def _parse_size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
    if match is None:
        raise InvalidRequest("size", "size must be WIDTHxHEIGHT, as in 64x64")
    return int(match[1]), int(match[2])


def _parse_seconds(value: Any) -> float:
    if re.fullmatch(r"\d{1,4}(\.\d{1,6})?", str(value)) is None or float(value) <= 0:
        raise InvalidRequest("seconds", "seconds must be a number above 0")
    return float(value)


def _parse_fps(value: Any) -> int:
    if re.fullmatch(r"\d{1,2}", str(value)) is None or not 1 <= int(value) <= 60:
        raise InvalidRequest("fps", "fps must be a whole number from 1 to 60")
    return int(value)
