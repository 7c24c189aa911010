"""Prices over HTTP: of what is deployed, and of every family that has a price."""

from typing import Any

import pytest

from credits.accounts import Account
from models.families import PUBLISHED
from models.request import ModelFamily
from tests.database.conftest import Door


def estimate(door: Door, **fields: Any) -> Any:
    return door.as_account()("POST", "/api/v1/video/estimate", json=fields)


@pytest.mark.parametrize(
    ("name", "num_frames", "size", "credits"),
    [
        ("animatediff", 16, "512x512", 16),
        ("svd-xt", 25, "576x1024", 84),
        ("z-image-video", 48, "1280x720", 288),
        ("hunyuan-video", 129, "1280x720", 1161),
    ],
)
def test_the_founding_examples_hold_over_http(
    door: Door, alice: Account, name: str, num_frames: int, size: str, credits: int
) -> None:
    price = estimate(door, model=name, num_frames=num_frames, size=size).json()
    assert price["credits"] == credits
    assert not price["deployed"]
    refused = door.as_account()(
        "POST", "/v1/videos", json={"prompt": "x", "model": name, "num_frames": num_frames}
    )
    if name != "z-image-video":
        assert refused.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("family", list(ModelFamily))
def test_every_family_has_a_price_without_a_word(
    door: Door, alice: Account, family: ModelFamily
) -> None:
    price = estimate(door, model=family).json()
    assert price["family"] == family
    assert price["deployed"] == (family is ModelFamily.Z_IMAGE_VIDEO)
    if not price["deployed"]:
        published = PUBLISHED[family]
        assert price["num_frames"] == published.num_frames
        assert price["size"] == f"{published.width}x{published.height}"


def test_what_is_generated_is_shown_beside_what_is_billed(door: Door, alice: Account) -> None:
    price = estimate(door, model="hunyuan-video", seconds="2", size="1280x720").json()
    assert (price["num_frames"], price["generated"]["num_frames"]) == (48, 49)
    assert price["generated"]["size"] == "1280x720"
    taller = estimate(door, model="hunyuan-video", size="1920x1080").json()
    assert taller["generated"]["size"] == "1920x1088"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "svd", "num_frames": 15}, "num_frames"),
        ({"model": "svd", "num_frames": 0}, "num_frames"),
        ({"model": "animatediff", "size": "511x512"}, "width"),
        ({"model": "animatediff", "size": "4096x4096"}, "size"),
        ({"model": "animatediff", "size": "wide"}, "size"),
        ({"model": "z-image-video", "size": "4096x4096"}, "size"),
        ({"model": "hunyuan-video", "fps": 0, "seconds": "1"}, "fps"),
        ({"model": "hunyuan-video", "colour": "red"}, "colour"),
    ],
)
def test_what_nobody_makes_has_no_price(
    door: Door, alice: Account, fields: dict[str, Any], param: str
) -> None:
    refused = estimate(door, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_model_that_nobody_knows_is_404(door: Door, alice: Account) -> None:
    assert estimate(door, model="sora").json()["error"]["code"] == "model_not_found"
