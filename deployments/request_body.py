"""Reads the body of a create request, JSON or multipart, into named fields and their files."""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from deployments.config import LimitsConfig
from deployments.picture_fields import read_image, read_picture, read_video
from deployments.region_fields import in_turn, read_regions, read_schedule
from deployments.request_fields import has_surrogates, named_fields, nest_brackets, parse_json
from models.catalog import Model
from models.families import WITHOUT_PROMPT
from models.request import InvalidRequest, VideoRequest
from models.start_image import CropBox


@dataclass(frozen=True, slots=True)
class CreateBody:
    """The given fields under their own names, model and files apart.

    image: bytes, or the URL where they are. video: bytes, or the id of a video made here.
    control_reference, region_masks, mask: any of these; the last one is of what is to change.
    schedule: texts by the frame that each begins at.
    """

    model: str | None
    fields: dict[str, Any]
    image: bytes | str | None = None
    crop: CropBox | None = None
    video: bytes | str | None = None
    control_reference: bytes | str | None = None
    region_masks: tuple[bytes | str, ...] = ()
    schedule: tuple[tuple[int, str], ...] = ()
    mask: bytes | str | None = None

    def resolve(self, model: Model, limits: LimitsConfig) -> VideoRequest:
        """The complete request for a model; InvalidRequest names the faulty field."""
        fields = self.with_size_and_frames(model.manifest.defaults.fps)
        if model.manifest.family in WITHOUT_PROMPT:
            fields.setdefault("prompt", "")
        elif not str(fields.get("prompt", "-")).strip():
            raise InvalidRequest("prompt", "prompt must not be empty")
        _check_texts(fields, limits)
        for region in fields.get("regions", ()):
            _check_text("regions", dict(region)["prompt"], limits)
        for _, prompt in self.schedule:
            _check_text("prompt_schedule", prompt, limits)
        resolved = model.resolve(fields)
        if not self.schedule:
            return resolved
        return model.resolve(
            {**fields, "seed": resolved.seed, "regions": in_turn(self.schedule, resolved)}
        )

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
            fields["num_frames"] = round(seconds * parse_fps(fields.get("fps", default_fps)))
        return fields


async def read_create_body(request: Request, *, derived: bool = False) -> CreateBody:
    """Parse the body; InvalidRequest for what is malformed or unknown.

    derived: the request changes or goes on from a video.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        given = await _read_form(request)
    else:
        given = await _read_json(request)
    fields = named_fields(given)
    if "loras" in fields:
        fields["loras"] = _read_loras(fields["loras"])
    for name in () if derived else ("video", "strength", "denoising_start", "mask"):
        if name in fields:
            raise InvalidRequest(name, f"{name} is a field of /v1/videos/edits and /extensions")
    for name in ("regions", "prompt_schedule", "seed_variance", "step_cache", "free_noise"):
        if name in fields:
            fields[name] = parse_json(name, fields[name])
    control_reference = _read_control(fields)
    region_masks = read_regions(fields)
    model = fields.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise InvalidRequest("model", "model must be a string")
    return CreateBody(
        model,
        fields,
        read_image("input_reference", fields.pop("input_reference", None)),
        _read_crop(fields.pop("crop", None)),
        read_video("video", fields.pop("video", None)),
        control_reference,
        region_masks,
        read_schedule(fields),
        read_picture("mask", fields.pop("mask", None)),
    )


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(None, "the body is neither JSON nor multipart/form-data") from error
    if not isinstance(content, dict):
        raise InvalidRequest(None, "the body must be a JSON object")
    return content


async def _read_form(request: Request) -> dict[str, Any]:
    try:
        # BodyLimit counts the whole body already; a data URL is one long part.
        async with request.form(max_part_size=sys.maxsize) as form:
            items = [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except HTTPException as error:
        raise InvalidRequest(None, f"malformed multipart body: {error.detail}") from error
    return nest_brackets(items)


def _read_control(fields: dict[str, Any]) -> bytes | str | None:
    """Make `control` what VideoRequest has, and take out what it refers to.

    Given as a name, or as {"type", "scale", "start", "end", "preprocess", "frames"}; there, as
    "image" or "video", may also be what is otherwise in control_reference.
    """
    value, reference = fields.pop("control", None), fields.pop("control_reference", None)
    if value is None:
        if reference is not None:
            message = 'control is required: what control_reference is, as {"type": "canny"}'
            raise InvalidRequest("control", message)
        return None
    if isinstance(value, str) and value.startswith("{"):
        value = parse_json("control", value)
    control = {"type": value} if isinstance(value, str) else value
    if not isinstance(control, dict):
        raise InvalidRequest("control", "control must be a name or an object")
    known = {"type", "scale", "start", "end", "preprocess", "frames", "image", "video"}
    for name in control:
        if name not in known:
            raise InvalidRequest("control", f"control takes no {name}; it takes {sorted(known)}")
    found = [
        read_image("control", control.pop("image", None)),
        read_video("control", control.pop("video", None)),
        read_picture("control_reference", reference),
    ]
    given = [source for source in found if source is not None]
    if len(given) != 1:
        message = "control_reference is required, once: a file, a URL, or the id of a video"
        raise InvalidRequest("control_reference", message)
    if "type" not in control:
        raise InvalidRequest("control", "control: type is required")
    fields["control"] = control
    return given[0]


def _read_crop(value: Any) -> CropBox | None:
    if value is None:
        return None
    box = parse_json("crop", value)
    names = ("x", "y", "width", "height")
    if not isinstance(box, dict) or set(box) != set(names):
        raise InvalidRequest("crop", "crop must have x, y, width and height, in pixels")
    for name, least in zip(names, (0, 0, 1, 1), strict=True):
        if re.fullmatch(r"\d{1,6}", str(box[name])) is None or int(box[name]) < least:
            raise InvalidRequest("crop", f"crop: {name} must be a whole number from {least}")
    return CropBox(*(int(box[name]) for name in names))


def _read_loras(value: Any) -> list[dict[str, Any]]:
    """Names, or objects of name and weight; one or several, also as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        value = parse_json("loras", value)
    uses = value if isinstance(value, list) else [value]
    read = [{"name": use} if isinstance(use, str) else use for use in uses]
    if not all(isinstance(use, dict) for use in read):
        raise InvalidRequest("loras", "loras must be names, or objects of name and weight")
    return read


def _check_texts(fields: dict[str, Any], limits: LimitsConfig) -> None:
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "prompt is required")
    for name in ("prompt", "negative_prompt", "user"):
        _check_text(name, fields.get(name, ""), limits)
    tags = fields.get("tags", [])
    if not isinstance(tags, list):
        raise InvalidRequest("tags", "tags must be a list of strings")
    for tag in tags:
        _check_text("tags", tag, limits)


def _check_text(name: str, text: Any, limits: LimitsConfig) -> None:
    if not isinstance(text, str):
        raise InvalidRequest(name, f"{name} must be a string")
    if "\x00" in text:
        raise InvalidRequest(name, f"{name} must not contain NUL")
    if has_surrogates(text):
        raise InvalidRequest(name, f"{name} is not valid Unicode")
    if len(text) > limits.max_prompt_chars:
        raise InvalidRequest(name, f"{name} is limited to {limits.max_prompt_chars} characters")


def _parse_size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
    if match is None:
        raise InvalidRequest("size", "size must be WIDTHxHEIGHT, as in 64x64")
    return int(match[1]), int(match[2])


def _parse_seconds(value: Any) -> float:
    if re.fullmatch(r"\d{1,4}(\.\d{1,6})?", str(value)) is None or float(value) <= 0:
        raise InvalidRequest("seconds", "seconds must be a number above 0")
    return float(value)


def parse_fps(value: Any) -> int:
    """Frames a second as a number; InvalidRequest."""
    if re.fullmatch(r"\d{1,2}", str(value)) is None or not 1 <= int(value) <= 60:
        raise InvalidRequest("fps", "fps must be a whole number from 1 to 60")
    return int(value)
