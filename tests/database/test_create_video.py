"""Creating videos over HTTP: both kinds of body, and bad input refused before any credit."""

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine

from credits.accounts import Account
from tests.conftest import read_account
from tests.database.conftest import Door, png

AnAccount = Callable[..., Account]


def test_a_created_video_has_the_wire_shape(door: Door, alice: Account) -> None:
    response = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
    assert response.status_code == 200
    assert response.headers["openai-poll-after-ms"].isdecimal()
    video = response.json()
    assert video["object"] == "video"
    assert (video["status"], video["progress"]) == ("queued", 0)
    assert (video["model"], video["size"], video["seconds"]) == ("z-image-video", "64x64", "1.625")
    assert isinstance(video["created_at"], int)
    assert (video["quoted"], video["charged"], video["refunded"]) == (26, None, None)
    assert door.wakes == [None]


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"prompt": "x", "num_frames": 14, "size": "70x50", "fps": 7}},
        {"json": {"prompt": "x", "numFrames": 14, "width": 70, "height": 50, "fps": 7}},
        {"json": {"prompt": "x", "seconds": "2", "size": "70x50", "fps": 7}},
        {"data": {"prompt": "x", "seconds": "2", "size": "70x50", "fps": "7"}},
        {"files": {"prompt": (None, "x"), "seconds": (None, "2"), "size": (None, "70x50"),
                   "fps": (None, "7")}},
    ],
)  # fmt: skip
def test_json_and_multipart_say_the_same(door: Door, alice: Account, form: Any) -> None:
    if "data" in form:
        form = {**form, "files": {"model": (None, "z-image-video")}}
    video = door.as_account()("POST", "/v1/videos", **form).json()
    assert (video["num_frames"], video["size"], video["fps"]) == (14, "70x50", 7)
    assert video["generated"] == {"num_frames": 17, "size": "80x64"}
    assert video["quoted"] == 28


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "  "}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": "a\u0000b"}, 400, "prompt"),
        ({"prompt": "a" * 4001}, 400, "prompt"),
        ({"prompt": "x", "negative_prompt": "\u0000"}, 400, "negative_prompt"),
        ({"prompt": "x", "size": "63x64"}, 400, "size"),
        ({"prompt": "x", "size": "64"}, 400, "size"),
        ({"prompt": "x", "size": "0x64"}, 400, "size"),
        ({"prompt": "x", "size": "99999x64"}, 400, "size"),
        ({"prompt": "x", "seconds": "-1"}, 400, "seconds"),
        ({"prompt": "x", "seconds": "soon"}, 400, "seconds"),
        ({"prompt": "x", "seconds": "9999"}, 400, "num_frames"),
        ({"prompt": "x", "fps": "fast"}, 400, "fps"),
        ({"prompt": "x", "fps": 0, "seconds": 1}, 400, "fps"),
        ({"prompt": "x", "num_frames": 131}, 400, "num_frames"),
        ({"prompt": "x", "num_frames": 1.5}, 400, "num_frames"),
        ({"prompt": "x", "num_frames": [1]}, 400, "num_frames"),
        ({"prompt": "x", "f_patch_size": 3}, 400, "f_patch_size"),
        ({"prompt": "x", "colour": "red"}, 400, "colour"),
        ({"prompt": "x", "num_steps": 3, "steps": 3}, 400, "steps"),
        ({"prompt": "x", "size": "64x64", "width": 64}, 400, "width"),
        ({"prompt": "x", "seconds": "1", "num_frames": 8}, 400, "num_frames"),
        ({"prompt": "x", "model": "sora-2"}, 404, "model"),
        ({"prompt": "x", "model": 2}, 400, "model"),
        ({"prompt": "x", "input_reference": "http://10.0.0.1/y.png"}, 400, "input_reference"),
        ({"prompt": "x", "input_reference": "ftp://x/y.png"}, 400, "input_reference"),
        ({"prompt": "x", "input_reference": ["a", "b"]}, 400, "input_reference"),
        ({"prompt": "x", "lora": {"name": "a"}}, 400, "loras"),
        ({"prompt": "x", "controlType": "depth"}, 400, "controlType"),
        ({"prompt": "x", "n": 2}, 400, "n"),
        ({"prompt": "x", "motionStrength": 1.1}, 400, "motion_strength"),
        ({"prompt": "x", "flow_shift": 0}, 400, "flow_shift"),
        ({"prompt": "x", "tags": "a"}, 400, "tags"),
        ({"prompt": "x", "tags": ["a" * 65]}, 400, "tags.0"),
        ({"prompt": "x", "tags": ["a\u0000"]}, 400, "tags"),
        ({"prompt": "x", "user": 5}, 400, "user"),
        ({"prompt": "x", "extra_params": "{"}, 400, "extra_params"),
        ({"prompt": "x", "extra_params": {"colour": 1}}, 400, "colour"),
        ({"prompt": "x", "video": "video_1"}, 400, "video"),
        ({"prompt": "x", "strength": 0.5}, 400, "strength"),
        ({"prompt": "x", "crop": {"x": 0}}, 400, "crop"),
        ({"prompt": "x", "crop": {"x": 0, "y": 0, "width": 0, "height": 9}}, 400, "crop"),
        ({"prompt": "x", "crop": {"x": 0, "y": 0, "width": 9, "height": 9}}, 400, "crop"),
        ({"prompt": "x", "input_reference": "data:image/png;base64,!"}, 400, "input_reference"),
        ({"prompt": "x", "input_reference": "data:image/png;base64,AAAA"}, 400, "input_reference"),
        ({"prompt": "x", "input_reference": {"file_id": "f"}}, 400, "input_reference"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/api/v1/video/generate"])
def test_bad_input_names_its_field_and_reserves_nothing(
    engine: Engine, door: Door, alice: Account, path: str, fields: Any, status: int, param: str
) -> None:
    response = door.as_account()("POST", path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    if status == 404:
        assert error["code"] == "model_not_found"
    assert read_account(engine, "alice") == alice
    assert door.wakes == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[1]", "application/json"),
        (b"", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b"nothing", "multipart/form-data"),
        (b"--x\r\nbad\r\n", "multipart/form-data; boundary=x"),
    ],
)
def test_a_malformed_body_is_400(door: Door, alice: Account, body: bytes, kind: str) -> None:
    response = door.as_account()("POST", "/v1/videos", content=body, headers={"content-type": kind})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_lone_surrogates_are_refused(door: Door, alice: Account) -> None:
    response = door.as_account()(
        "POST",
        "/v1/videos",
        content=rb'{"prompt": "\ud800"}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_body_that_is_too_long_is_413(engine: Engine, door: Door, alice: Account) -> None:
    files = {"input_reference": ("x.png", b"\0" * 300_000)}
    response = door.as_account()("POST", "/v1/videos", data={"prompt": "x"}, files=files)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert read_account(engine, "alice") == alice


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/videos", "/api/v1/video/estimate"])
def test_no_route_reads_more_than_the_limit(
    engine: Engine, door: Door, alice: Account, path: str
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(40):
            yield b'{"prompt": "x", "name": "' + b" " * 9_975

    headers = {"content-type": "application/json"}
    response = door.as_account()("POST", path, content=body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert read_account(engine, "alice") == alice


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises that size and ends."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked


@pytest.mark.parametrize("side", [1000, 10_000, 20_000])
def test_an_image_of_too_many_pixels_is_never_decoded(
    door: Door, alice: Account, side: int
) -> None:
    files = {"input_reference": ("x.png", png_header(side, side))}
    response = door.as_account()("POST", "/v1/videos", data={"prompt": "x"}, files=files)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input_reference"


@pytest.mark.parametrize("content", [b"", b"no image", png(200, 100), png()[:50]])
def test_an_image_that_cannot_be_used_is_400(
    engine: Engine, door: Door, alice: Account, content: bytes
) -> None:
    files = {"input_reference": ("x.png", content)}
    response = door.as_account()("POST", "/v1/videos", data={"prompt": "x"}, files=files)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input_reference"
    assert read_account(engine, "alice") == alice
    assert list(door.store.list("")) == []


def test_a_start_image_is_kept_for_the_job(door: Door, alice: Account) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    forms: list[dict[str, Any]] = [
        {"data": {"prompt": "x"}, "files": {"input_reference": ("x.png", png())}},
        {"files": {"prompt": (None, "x"), "input_reference[image_url]": (None, url)}},
        {"json": {"prompt": "x", "input_reference": {"image_url": url}}},
        {"json": {"prompt": "x", "startImage": url}},
    ]
    for form in forms:
        video = door.as_account()("POST", "/v1/videos", **form).json()
        assert video["image_to_video"]
        with Image.open(io.BytesIO(door.store.get(f"inputs/{video['id']}"))) as image:
            assert (image.format, image.size) == ("PNG", (64, 64))


@pytest.mark.parametrize(("crop", "warned"), [(None, True), ((0, 0, 20, 20), False)])
def test_an_image_of_another_aspect_is_warned_of(
    door: Door, alice: Account, crop: tuple[int, ...] | None, warned: bool
) -> None:
    files: dict[str, Any] = {"prompt": (None, "x"), "input_reference": ("x.png", png(40, 20))}
    if crop is not None:
        box = zip(("x", "y", "width", "height"), crop, strict=True)
        files |= {f"crop[{name}]": (None, str(value)) for name, value in box}
    video = door.as_account()("POST", "/v1/videos", files=files).json()
    assert any("aspect" in warning for warning in video["warnings"]) == warned


def test_what_has_no_effect_is_warned_of_and_tags_are_kept(door: Door, alice: Account) -> None:
    fields = [("prompt", "x"), ("motionStrength", "0.7"), ("tags[]", "a"), ("tags[]", "b")]
    files = [(name, (None, value)) for name, value in [*fields, ("user", "u1")]]
    video = door.as_account()("POST", "/v1/videos", files=files).json()
    assert video["warnings"] == ["motion_strength has no effect on z-image-video"]
    assert (video["tags"], video["user"], video["motion_strength"]) == (["a", "b"], "u1", 0.7)


@pytest.mark.parametrize(("guidance_scale", "warned"), [(1.0, True), (2.0, False)])
def test_a_negative_prompt_without_guidance_is_warned_of(
    door: Door, alice: Account, guidance_scale: float, warned: bool
) -> None:
    body = {"prompt": "x", "negative_prompt": "grey", "guidance_scale": guidance_scale}
    warnings = door.as_account()("POST", "/v1/videos", json=body).json()["warnings"]
    assert warnings == ["negative_prompt has no effect without guidance"] * warned


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"numFrames": 3}, 400),
        ({"numFrames": 4}, 202),
        ({"numFrames": 129}, 202),
        ({"num_frames": 130}, 400),
        ({"seconds": "0.25", "fps": 8}, 400),
        ({"fps": 0}, 400),
        ({"fps": 60}, 202),
        ({"fps": 61}, 400),
        ({"motionStrength": 0}, 202),
        ({"motion_strength": 1}, 202),
        ({"motionStrength": 1.01}, 400),
        ({"motionStrength": -0.01}, 400),
    ],
)
def test_the_founding_apis_ranges(
    engine: Engine, door: Door, alice: Account, fields: dict[str, Any], status: int
) -> None:
    body = {"prompt": "x", **fields}
    answer = door.as_account()("POST", "/api/v1/video/generate", json=body)
    assert answer.status_code == status, answer.text
    if status == 400:
        named = answer.json()["error"]["param"]
        assert named in {"num_frames", "fps", "motion_strength"}
        assert read_account(engine, "alice").reserved == 0
