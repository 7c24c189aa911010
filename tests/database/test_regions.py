"""Words for parts of a video over HTTP: how they are given, and what is refused by name."""

import base64
import io
import json
from collections.abc import Callable
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
from models.masks import read_masks
from tests.database.conftest import Door, end_next_job
from tests.database.test_derived import write_mp4

pytestmark = pytest.mark.database

FIELDS = {"prompt": "x", "num_frames": 5}
LEFT = {"x": 0, "y": 0, "width": 32, "height": 64}


def left_half(width: int = 64, height: int = 64) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def admitted(engine: Engine, door: Door, **body: Any) -> tuple[dict[str, Any], Job]:
    response = door.as_account()("POST", "/v1/videos", **body)
    assert response.status_code == 200, response.text
    with reader(engine).begin() as connection:
        return response.json(), get_job(connection, response.json()["id"])


def test_boxes_and_frames_are_regions(engine: Engine, door: Door, alice: Account) -> None:
    regions = [
        {"prompt": "a fox", "box": LEFT},
        {"prompt": "snow", "box": [32, 0, 32, 64], "frames": [0, 3]},
    ]
    video, job = admitted(engine, door, json={**FIELDS, "regions": regions})
    assert video["regions"] == [
        {"prompt": "a fox", "box": [0, 0, 32, 64], "frames": None, "has_mask": False},
        {"prompt": "snow", "box": [32, 0, 32, 64], "frames": [0, 3], "has_mask": False},
    ]
    assert job.request["region_masks"] is None


def test_masks_come_as_data_urls_files_and_videos(
    engine: Engine, door: Door, alice: Account, tmp_path: Path
) -> None:
    regions = [{"prompt": "a", "mask": data_url(left_half())}, {"prompt": "b", "box": LEFT}]
    _, by_url = admitted(engine, door, json={**FIELDS, "regions": regions})
    expected = np.zeros((1, 64, 64), bool)
    expected[:, :, :32] = True
    assert (read_masks(door.store.get(by_url.request["region_masks"])) == expected[None]).all()
    lights_up = write_mp4(tmp_path / "mask.mp4", num_frames=5)  # from black to white
    form = [
        ("prompt", (None, "x")),
        ("num_frames", (None, "5")),
        ("regions", (None, json.dumps([{"prompt": "a", "mask": 1}, {"prompt": "b", "mask": 0}]))),
        ("region_masks[]", ("left.png", left_half())),
        ("region_masks[]", ("lights.mp4", lights_up)),
    ]
    video, by_files = admitted(engine, door, files=form)
    assert [region["has_mask"] for region in video["regions"]] == [True, True]
    masks = read_masks(door.store.get(by_files.request["region_masks"]))
    assert masks.shape == (2, 5, 64, 64)
    assert masks[0].all(axis=(1, 2)).tolist() == [False, False, False, True, True]
    assert (masks[1] == expected).all()


def test_a_schedule_gives_each_text_its_frames(engine: Engine, door: Door, alice: Account) -> None:
    schedule = [{"frame": 2, "prompt": "day"}, {"frame": 4, "prompt": "night"}]
    video, _ = admitted(engine, door, json={**FIELDS, "prompt_schedule": schedule, "seed": 9})
    assert [(r["prompt"], r["frames"]) for r in video["regions"]] == [
        ("day", [2, 3]),
        ("night", [4, 4]),
    ]
    assert video["seed"] == 9


def test_variance_is_told(engine: Engine, door: Door, alice: Account) -> None:
    form = {**{name: (None, str(value)) for name, value in FIELDS.items()}}
    files = {**form, "seed_variance": (None, '{"strength": 0.3, "per_frame": true}')}
    video, _ = admitted(engine, door, files=files)
    assert video["seed_variance"] == {"strength": 0.3, "percent": 50.0, "per_frame": True}


def a_region(**fields: Any) -> dict[str, Any]:
    return {"regions": [{"prompt": "a", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regions": {}}, "regions"),
        ({"regions": ["a"]}, "regions"),
        ({"regions": [{"box": LEFT}]}, "regions"),
        ({"regions": [{"prompt": " ", "box": LEFT}]}, "regions"),
        ({"regions": [{"prompt": "a\x00", "box": LEFT}]}, "regions"),
        (a_region(), "regions"),
        (a_region(colour="red"), "regions"),
        (a_region(box={"x": 0}), "regions"),
        (a_region(box=[0, 0, 65, 64]), "regions"),
        (a_region(box=[0, 0, -1, 64]), "regions.0.box.2"),
        (a_region(frames=[0]), "regions.0.frames.1"),
        (a_region(frames=[0, 5]), "regions"),
        (a_region(mask=0), "regions"),
        (a_region(mask=data_url(left_half(32, 32))), "regions"),
        (a_region(mask=data_url(b"noise")), "regions"),
        ({"prompt_schedule": []}, "prompt_schedule"),
        ({"prompt_schedule": [{"frame": 0}]}, "prompt_schedule"),
        ({"prompt_schedule": [{"frame": 5, "prompt": "a"}]}, "prompt_schedule"),
        ({"prompt_schedule": [{"frame": -1, "prompt": "a"}]}, "prompt_schedule"),
        ({"prompt_schedule": [{"frame": 1, "prompt": "a"}, {"frame": 1, "prompt": "b"}]},
         "prompt_schedule"),
        ({"prompt_schedule": [{"frame": 1, "prompt": "a"}], **a_region(box=LEFT)},
         "prompt_schedule"),
        ({"seed_variance": {"strength": 3}}, "seed_variance.strength"),
        ({"seed_variance": {"colour": 3}}, "seed_variance.colour"),
        ({"seed_variance": 1}, "seed_variance"),
    ],
)  # fmt: skip
def test_what_is_no_region_is_refused_before_credits_are_reserved(
    door: Door, alice: Account, fields: dict[str, Any], param: str
) -> None:
    call = door.as_account()
    response = call("POST", "/v1/videos", json={**FIELDS, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert call("GET", "/v1/credits").json()["reserved"] == 0
    assert list(door.store.list("inputs/")) == []


def test_a_mask_of_too_few_frames_is_refused(door: Door, alice: Account, tmp_path: Path) -> None:
    form = {
        "prompt": (None, "x"),
        "num_frames": (None, "5"),
        "regions": (None, json.dumps([{"prompt": "a", "mask": 0}])),
        "region_masks[]": ("mask.mp4", write_mp4(tmp_path / "mask.mp4", num_frames=4)),
    }
    response = door.as_account()("POST", "/v1/videos", files=form)
    assert response.json()["error"]["param"] == "regions"
    assert "4 frames, not 5" in response.json()["error"]["message"]


def test_a_remix_keeps_regions_but_not_their_masks(
    engine: Engine, door: Door, alice: Account, tmp_path: Path
) -> None:
    call: Callable[..., Any] = door.as_account()
    content = write_mp4(tmp_path / "made.mp4", num_frames=5)
    _, boxed = admitted(engine, door, json={**FIELDS, **a_region(box=LEFT)})
    end_next_job(engine, door.store, content=content)
    remixed = call("POST", f"/v1/videos/{boxed.id}/remix", json={"prompt": "y"})
    assert remixed.json()["regions"] == boxed.request["regions"]
    end_next_job(engine, door.store, content=content)
    _, masked = admitted(engine, door, json={**FIELDS, **a_region(mask=data_url(left_half()))})
    end_next_job(engine, door.store, content=content)
    path = f"/v1/videos/{masked.id}/remix"
    refused = call("POST", path, json={"prompt": "y"})
    assert refused.json()["error"]["param"] == "regions"
    schedule = [{"frame": 2, "prompt": "day"}]
    again = call("POST", path, json={"prompt": "y", "prompt_schedule": schedule})
    assert again.json()["regions"][0]["frames"] == [2, 4]
