"""Edits of a part of a video, and of a part of the steps, over HTTP."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine

from credits.accounts import Account
from deployments.database import reader
from jobs.job import Job
from jobs.store import get_job
from tests.database.conftest import Door
from tests.database.test_derived import write_mp4

pytestmark = pytest.mark.database


def half(side: int = 64) -> bytes:
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> bytes:
    return write_mp4(tmp_path / "source.mp4", num_frames=5)


def edit(door: Door, source: bytes, **fields: Any) -> Any:
    files = {"prompt": (None, "x"), "video": ("source.mp4", source)}
    for name, value in fields.items():
        files[name] = (name, value) if isinstance(value, bytes) else (None, str(value))
    return door.as_account()("POST", "/v1/videos/edits", files=files)


def job_of(engine: Engine, answer: Any) -> Job:
    assert answer.status_code == 200, answer.text
    with reader(engine).begin() as connection:
        return get_job(connection, answer.json()["id"])


def test_what_a_mask_leaves_white_is_made_anew(
    engine: Engine, door: Door, alice: Account, source: bytes
) -> None:
    job = job_of(engine, edit(door, source, mask=half()))
    assert job.request["strength"] == 1.0
    kept = Image.open(io.BytesIO(door.store.get(job.request["mask"])))
    assert (kept.format, kept.size) == ("PNG", (64, 64))
    by_frame = job_of(engine, edit(door, source, mask=source, strength=0.7))
    assert by_frame.request["strength"] == 0.7
    assert door.store.get(by_frame.request["mask"]) == source


def test_denoising_begins_and_ends_where_it_is_said(
    engine: Engine, door: Door, alice: Account, source: bytes
) -> None:
    answer = edit(door, source, denoising_start=0.4, denoising_end=0.9)
    job = job_of(engine, answer)
    found = {name: answer.json()[name] for name in ("denoising_start", "denoising_end")}
    assert found == {"denoising_start": 0.4, "denoising_end": 0.9}
    assert job.request["strength"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mask": half(32)}, "mask"),
        ({"mask": b"noise"}, "mask"),
        ({"denoising_start": 0.5, "strength": 0.5}, "denoising_start"),
        ({"denoising_start": 0.5, "denoising_end": 0.4}, "denoising_end"),
        ({"denoising_start": 1}, "denoising_start"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_credits_are_reserved(
    door: Door, alice: Account, source: bytes, fields: dict[str, Any], param: str
) -> None:
    answer = edit(door, source, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert door.as_account()("GET", "/v1/credits").json()["reserved"] == 0
    assert list(door.store.list("inputs/")) == []


def test_a_mask_has_as_many_frames(
    door: Door, alice: Account, source: bytes, tmp_path: Path
) -> None:
    shorter = write_mp4(tmp_path / "mask.mp4", num_frames=4)
    answer = edit(door, source, mask=shorter)
    assert answer.json()["error"]["param"] == "mask"
    assert "4 frames, not 5" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["mask", "denoising_start"])
def test_only_edits_take_them(door: Door, alice: Account, source: bytes, name: str) -> None:
    call = door.as_account()
    value = half() if name == "mask" else b"0.5"
    given: dict[str, Any] = {name: (name, value) if name == "mask" else (None, "0.5")}
    created = call("POST", "/v1/videos", files={"prompt": (None, "x"), **given})
    assert created.json()["error"]["param"] == name
    files = {"prompt": (None, "x"), "video": ("s.mp4", source), **given}
    extended = call("POST", "/v1/videos/extensions", files=files)
    assert extended.json()["error"]["param"] == name
