"""Images and videos in a body: files, addresses, data URLs, ids of videos made here."""

import base64
import binascii
import re
from typing import Any

from deployments.request_fields import parse_json
from models.request import InvalidRequest

DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,(?P<content>.*)", re.DOTALL)
WEB_URL = re.compile(r"https?://\S+")
MAX_URL_CHARS = 2000


def read_image(param: str, value: Any) -> bytes | str | None:
    """The bytes of an uploaded file or of a data URL, or a URL; also as {"image_url": ...}."""
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidRequest(param, f"{param} takes one image")
        value = value[0]
    if isinstance(value, str) and value.startswith("{"):
        value = parse_json(param, value)
    if isinstance(value, dict):
        if set(value) != {"image_url"}:
            raise InvalidRequest(param, f"{param} takes only image_url")
        value = value["image_url"]
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str) and len(value) <= MAX_URL_CHARS and WEB_URL.fullmatch(value):
        return value
    match = DATA_URL.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidRequest(param, f"{param} must be a file, a URL or a data URL of an image")
    try:
        return base64.b64decode(match["content"], validate=True)
    except binascii.Error as error:
        raise InvalidRequest(param, f"{param} is not valid base64") from error


def read_picture(param: str, value: Any) -> bytes | str | None:
    """An image or a video."""
    if isinstance(value, str) and re.fullmatch(r"[\w-]{1,100}", value, re.ASCII) is not None:
        return value
    if isinstance(value, dict) and set(value) == {"id"}:
        return read_video(param, value)
    return read_image(param, value)


def read_video(param: str, value: Any) -> bytes | str | None:
    """An uploaded file, or the id of a video, also as {"id": ...}."""
    if isinstance(value, str) and value.startswith("{"):
        value = parse_json(param, value)
    if isinstance(value, dict):
        value = value.get("id") if set(value) == {"id"} else value
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or re.fullmatch(r"[\w-]{1,100}", value, re.ASCII) is None:
        raise InvalidRequest(param, f"{param} must be a file or the id of a video")
    return value
