"""Every family over HTTP: what it takes, and what it refuses before anything is reserved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from autoscaling.tiers import GpuTier, ServedOn
from credits.accounts import Account
from credits.plans import Plan
from deployments.admission import Offer
from deployments.ingress import IngressParts
from models.catalog import load_model
from models.lora import load_lora
from tests.database.conftest import Door, end_next_job, png
from tests.database.test_derived import write_mp4
from training.random_families import RANDOM_FAMILIES, write_random_lora

pytestmark = pytest.mark.database


@pytest.fixture
def parts(parts: IngressParts, random_family: Callable[[str], Path]) -> IngressParts:
    """The random families beside the model of the other tests."""
    served_on = (ServedOn(tier=GpuTier.LOCAL),)
    offers = {
        name: Offer(load_model(random_family(name), name), served_on) for name in RANDOM_FAMILIES
    }
    lora = random_family("animatediff").with_name("ink.safetensors")
    write_random_lora(lora)
    model = replace(offers["animatediff"].model, loras=(load_lora(lora, "ink"),))
    offers["animatediff"] = replace(offers["animatediff"], model=model)
    offers["svd"] = replace(offers["svd"], licence_override="bought on 2026-01-02")
    return replace(parts, offers={**parts.offers, **offers})


@pytest.fixture
def finished(engine: Engine, door: Door, tmp_path: Path) -> Callable[..., str]:
    """Creates a video of these fields and ends its job; its id."""

    def make(files: dict[str, Any]) -> str:
        created = door.as_account()("POST", "/v1/videos", files=files)
        assert created.status_code == 200, created.text
        end_next_job(engine, door.store, content=write_mp4(tmp_path / "made.mp4"))
        video_id: str = created.json()["id"]
        return video_id

    return make


IMAGE = {"input_reference": ("start.png", png(64, 64), "image/png")}


@pytest.mark.parametrize(
    ("name", "fields", "has_image", "param"),
    [
        ("svd", {}, False, "input_reference"),
        ("svd-xt", {"prompt": "x"}, False, "input_reference"),
        ("svd", {"num_frames": "15"}, True, "num_frames"),
        ("svd", {"negative_prompt": "x"}, True, "negative_prompt"),
        ("svd", {"motion_bucket_id": "256"}, True, "motion_bucket_id"),
        ("animatediff", {"prompt": "x"}, True, "input_reference"),
        ("animatediff", {}, False, "prompt"),
        ("animatediff", {"prompt": "x", "num_frames": "33"}, False, "num_frames"),
        ("animatediff", {"prompt": "x", "scheduler": "heun"}, False, "scheduler"),
        ("hunyuan-video", {"prompt": "x"}, True, "input_reference"),
        ("hunyuan-video-concat", {"prompt": "x"}, False, "input_reference"),
        ("hunyuan-video", {"prompt": "x", "noise_aug_strength": "1"}, False, "noise_aug_strength"),
        ("z-image-video", {"prompt": "x", "scheduler": "ddim"}, False, "scheduler"),
        ("z-image-video", {"prompt": "x", "true_cfg_scale": "2"}, False, "true_cfg_scale"),
    ],
)
def test_what_a_family_does_not_take_is_refused_before_credits_are_reserved(
    door: Door,
    an_account: Callable[..., Account],
    name: str,
    fields: dict[str, str],
    has_image: bool,
    param: str,
) -> None:
    an_account("alice")
    call = door.as_account()
    given: Any = {key: (None, value) for key, value in {**fields, "model": name}.items()}
    response = call("POST", "/v1/videos", files={**given, **(IMAGE if has_image else {})})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert call("GET", "/v1/credits").json()["reserved"] == 0
    assert list(door.store.list("inputs/")) == []


@pytest.mark.parametrize("name", RANDOM_FAMILIES)
def test_every_family_is_admitted(
    door: Door, an_account: Callable[..., Account], name: str
) -> None:
    an_account("alice")
    has_image = name.startswith("svd") or "-video-" in name
    given: Any = {"model": (None, name), "num_frames": (None, "5"), "prompt": (None, "a box")}
    response = door.as_account()(
        "POST", "/v1/videos", files={**given, **(IMAGE if has_image else {})}
    )
    assert response.status_code == 200, response.text
    video = response.json()
    assert (video["model"], video["num_frames"]) == (name, 5)
    ignored = [f"prompt has no effect on {name}"] if name.startswith("svd") else []
    assert video["warnings"] == ignored


def test_loras_are_those_of_the_model_and_of_the_plan(
    door: Door, an_account: Callable[..., Account]
) -> None:
    an_account("alice")
    an_account("bob", plan=Plan.BASIC)
    for account in ("alice", "bob"):
        call = door.as_account(account)
        body = {"model": "animatediff", "prompt": "x", "loras": [{"name": "oil"}]}
        response = call("POST", "/v1/videos", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "loras")
        assert "it has ink" in response.json()["error"]["message"]
    body = {"model": "animatediff", "prompt": "x", "lora": "ink", "size": "64x64"}
    video = door.as_account("alice")("POST", "/v1/videos", json=body).json()
    assert video["loras"] == [{"name": "ink", "weight": 1.0}]
    refused = door.as_account("bob")("POST", "/v1/videos", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "loras")
    models = door.as_account("alice")("GET", "/v1/models").json()["data"]
    assert {model["id"] for model in models if model["loras"] == ["ink"]} == {"animatediff"}


def test_a_model_without_words_needs_none(door: Door, an_account: Callable[..., Account]) -> None:
    an_account("alice")
    files = {"model": (None, "svd"), **IMAGE}
    video = door.as_account()("POST", "/v1/videos", files=files).json()
    assert (video["prompt"], video["warnings"], video["num_frames"]) == ("", [], 14)


def test_a_remix_takes_either_word_for_motion(
    door: Door, an_account: Callable[..., Account], finished: Callable[..., str]
) -> None:
    an_account("alice")
    call = door.as_account()
    former = finished({"model": (None, "svd"), **IMAGE})
    for field, value in (("motion_strength", 0.1), ("motion_bucket_id", 9)):
        video = call("POST", f"/v1/videos/{former}/remix", json={field: value}).json()
        others = {"motion_strength", "motion_bucket_id"} - {field}
        assert video[field] == value, video
        assert [video[other] for other in others] == [None]


def test_an_extension_asks_for_what_the_model_can(
    door: Door, an_account: Callable[..., Account], finished: Callable[..., str]
) -> None:
    """One frame of those that it makes is there already."""
    an_account("alice")
    call = door.as_account()
    former = finished({"model": (None, "animatediff"), "prompt": (None, "x")})
    body = {"model": "svd", "video": former}
    assert call("POST", "/v1/videos/extensions", json=body).json()["num_frames"] == 14
    refused = call("POST", "/v1/videos/extensions", json={**body, "num_frames": 14})
    assert refused.status_code == 400
    assert "at most 13 frames" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "name"),
    [("edits", "svd"), ("edits", "hunyuan-video"), ("extensions", "animatediff"),
     ("extensions", "hunyuan-video")],
)  # fmt: skip
def test_a_video_is_changed_and_extended_only_by_models_that_can(
    door: Door, an_account: Callable[..., Account], route: str, name: str
) -> None:
    an_account("alice")
    files = {
        "model": (None, name),
        "prompt": (None, "x"),
        "video": ("a.mp4", b"not read", "video/mp4"),
    }
    response = door.as_account()("POST", f"/v1/videos/{route}", files=files)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "video"


def test_models_tell_what_they_take_and_who_may_use_them(
    door: Door, an_account: Callable[..., Account]
) -> None:
    an_account("alice")
    listed = door.as_account()("GET", "/v1/models").json()["data"]
    models = {model["id"]: model for model in listed}
    assert models["animatediff"]["plans"] == [Plan.BASIC, Plan.PRO, Plan.ENTERPRISE]
    assert models["hunyuan-video"]["plans"] == [Plan.ENTERPRISE]
    assert models["animatediff"]["frames"] == {
        "min": 1, "max": 32, "max_with_free_noise": 128, "stride": 1,
    }  # fmt: skip
    assert models["svd"]["inputs"] == {
        "prompt": False,
        "input_reference": "required",
        "video": False,
        "control": {},
    }
    assert [models[name]["base"] for name in ("animatediff", "svd-xt")] == ["sd-1", "svd"]
    assert models["animatediff"]["inputs"] == {
        "prompt": True,
        "input_reference": "refused",
        "video": True,
        "control": {},
    }
    assert models["svd"]["licence"]["override"] == "bought on 2026-01-02"
    assert models["svd"]["defaults"]["motion_bucket_id"] == 127
