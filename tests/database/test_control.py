"""What leads a video, over HTTP: how it is given, and what is refused by name."""

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine

from autoscaling.tiers import GpuTier, ServedOn
from credits.accounts import Account
from credits.plans import Plan
from deployments.admission import Offer
from deployments.database import reader
from deployments.ingress import IngressParts
from jobs.job import Job
from jobs.store import get_job
from models.catalog import Model, load_model
from models.control import load_control_net
from models.request import ControlKind
from tests.database.conftest import Door, end_next_job, png
from tests.database.test_derived import write_mp4
from training.random_controls import RANDOM_CONTROLS, write_random_z_image_control

pytestmark = pytest.mark.database

UNION, NETS = "union", ("controlnet", "sparse-rgb", "sparse-scribble")
KINDS = {
    UNION: ("canny", "depth"),
    "controlnet": ("canny",),
    "sparse-rgb": ("rgb",),
    "sparse-scribble": ("scribble",),
}


@pytest.fixture(scope="module")
def models(
    model: Model, random_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Model]:
    """The model of the other tests and AnimateDiff, with control networks beside them."""
    folder = tmp_path_factory.mktemp("controls")
    write_random_z_image_control(model.folder / "transformer", folder / UNION)
    for name in NETS:
        RANDOM_CONTROLS[name](folder / name)

    def with_controls(model: Model, *names: str) -> Model:
        nets = [
            load_control_net(folder / name, name, tuple(map(ControlKind, KINDS[name])))
            for name in names
        ]
        return replace(model, controls=tuple(nets))

    animatediff = load_model(random_family("animatediff"), "animatediff")
    return {
        model.id: with_controls(model, UNION),
        "animatediff": with_controls(animatediff, *NETS),
        "plain": replace(animatediff, id="plain"),
    }


@pytest.fixture
def parts(parts: IngressParts, models: dict[str, Model]) -> IngressParts:
    served_on = (ServedOn(tier=GpuTier.LOCAL),)
    return replace(parts, offers={name: Offer(m, served_on) for name, m in models.items()})


@pytest.fixture
def clip(tmp_path: Path) -> Callable[[int], bytes]:
    """An MP4 of so many frames."""
    return lambda num_frames: write_mp4(tmp_path / "clip.mp4", num_frames=num_frames)


def form(fields: dict[str, Any], reference: bytes | None = None) -> dict[str, Any]:
    given: dict[str, Any] = {name: (None, str(value)) for name, value in fields.items()}
    given = {"prompt": (None, "x"), "num_frames": (None, "5"), **given}
    return given if reference is None else {**given, "control_reference": ("x", reference)}


def admitted(engine: Engine, door: Door, body: dict[str, Any]) -> tuple[dict[str, Any], Job]:
    response = door.as_account()("POST", "/v1/videos", **body)
    assert response.status_code == 200, response.text
    video = response.json()
    with reader(engine).begin() as connection:
        return video, get_job(connection, video["id"])


def test_an_image_leads_every_frame(engine: Engine, door: Door, alice: Account) -> None:
    body = {"files": form({"control": "canny", "size": "64x32"}, png(40, 40))}
    video, job = admitted(engine, door, body)
    expected = {
        "type": "canny",
        "scale": 0.75,
        "start": 0,
        "end": 1,
        "preprocess": False,
        "frames": None,
    }
    assert video["control"] == job.request["control"] == expected
    stored = Image.open(io.BytesIO(door.store.get(job.request["control_reference"])))
    assert (stored.format, stored.size) == ("PNG", (64, 32))


def test_a_video_leads_frame_by_frame(
    engine: Engine, door: Door, alice: Account, clip: Callable[[int], bytes]
) -> None:
    content = clip(5)
    control = '{"type": "depth", "scale": 0.5, "start": 0.1, "end": 0.9}'
    video, job = admitted(engine, door, {"files": form({"control": control}, content)})
    given = {name: video["control"][name] for name in ("type", "scale", "start", "end")}
    assert given == {"type": "depth", "scale": 0.5, "start": 0.1, "end": 0.9}
    assert door.store.get(job.request["control_reference"]) == content


def test_a_forms_brackets_are_the_same(engine: Engine, door: Door, alice: Account) -> None:
    fields = {"control[type]": "canny", "control[preprocess]": "true", "control[scale]": "1.5"}
    video, _ = admitted(engine, door, {"files": form(fields, png())})
    assert (video["control"]["preprocess"], video["control"]["scale"]) == (True, 1.5)


def test_json_holds_the_image_or_the_id_of_a_video(
    engine: Engine, door: Door, alice: Account, clip: Callable[[int], bytes]
) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    fields = {"prompt": "x", "num_frames": 5}
    _, job = admitted(
        engine, door, {"json": {**fields, "control": {"type": "canny", "image": url}}}
    )
    end_next_job(engine, door.store, content=clip(5))
    for body in (
        {"control": {"type": "depth", "video": job.id}},
        {"control": "depth", "control_reference": job.id},
        {"control": "depth", "control_reference": {"id": job.id}},
    ):
        _, led = admitted(engine, door, {"json": {**fields, **body}})
        assert door.store.get(led.request["control_reference"]) == clip(5)


def test_an_image_leads_the_first_frame_where_control_is_sparse(
    engine: Engine, door: Door, alice: Account
) -> None:
    fields = {"model": "animatediff", "control": "scribble"}
    video, _ = admitted(engine, door, {"files": form(fields, png())})
    assert video["control"]["frames"] == [0]


def test_some_frames_are_led_by_a_picture_each(
    engine: Engine, door: Door, alice: Account, clip: Callable[[int], bytes]
) -> None:
    fields = {"model": "animatediff", "control": '{"type": "rgb", "frames": [0, 4]}'}
    video, _ = admitted(engine, door, {"files": form(fields, clip(2))})
    assert video["control"]["frames"] == [0, 4]


def test_animatediff_begins_from_an_image_where_a_network_is_there_for_it(
    engine: Engine, door: Door, alice: Account
) -> None:
    image = {"input_reference": ("start.png", png(64, 64), "image/png")}
    video, _ = admitted(engine, door, {"files": {**form({"model": "animatediff"}), **image}})
    assert video["image_to_video"]
    refused = door.as_account()("POST", "/v1/videos", files={**form({"model": "plain"}), **image})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_reference")


@pytest.mark.parametrize(
    ("fields", "reference", "param"),
    [
        ({"control": "pose"}, "image", "control"),
        ({"control": "cats"}, "image", "control.type"),
        ({"control": "{"}, "image", "control"),
        ({"control": "[1]"}, "image", "control.type"),
        ({"control": '{"scale": 1}'}, "image", "control"),
        ({"control": '{"type": ["canny"]}'}, "image", "control.type"),
        ({"control": '{"type": "canny", "colour": 1}'}, "image", "control"),
        ({"control": '{"type": "canny", "scale": 3}'}, "image", "control.scale"),
        ({"control": '{"type": "canny", "frames": [0]}'}, "image", "control"),
        ({"control": '{"type": "depth", "preprocess": true}'}, "image", "control"),
        ({"control": "canny"}, None, "control_reference"),
        ({"control": "canny"}, "noise", "control_reference"),
        ({"control": "canny"}, "4 frames", "control_reference"),
        ({"control": "canny"}, "6 frames", "control_reference"),
        ({}, "image", "control"),
        ({"model": "animatediff", "control": '{"type": "rgb", "frames": [0, 1]}'}, "image",
         "control_reference"),
        ({"model": "animatediff", "control": '{"type": "rgb", "frames": [0, 5]}'}, "2 frames",
         "control"),
        ({"model": "animatediff", "control": '{"type": "rgb", "frames": [0, 1]}'}, "4 frames",
         "control_reference"),
        ({"model": "plain", "control": "canny"}, "image", "control"),
    ],
)  # fmt: skip
def test_what_cannot_lead_is_refused_before_credits_are_reserved(
    door: Door,
    alice: Account,
    clip: Callable[[int], bytes],
    fields: dict[str, Any],
    reference: str | None,
    param: str,
) -> None:
    content = {"image": png(), "noise": b"\x00" * 99, None: None}.get(reference)
    if reference is not None and reference.endswith("frames"):
        content = clip(int(reference[0]))
    call = door.as_account()
    response = call("POST", "/v1/videos", files=form(fields, content))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert call("GET", "/v1/credits").json()["reserved"] == 0
    assert list(door.store.list("inputs/")) == []


def test_control_is_of_the_plans_that_have_all_modes(
    door: Door, an_account: Callable[..., Account]
) -> None:
    an_account("alice", plan=Plan.BASIC)
    fields = {"model": "animatediff", "control": "canny"}
    response = door.as_account()("POST", "/v1/videos", files=form(fields, png()))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (403, "plan_forbids", "control")


def test_another_reference_is_another_request(door: Door, alice: Account) -> None:
    call = door.as_account()
    headers = {"Idempotency-Key": "once"}
    sent = [
        call("POST", "/v1/videos", files=form({"control": "canny"}, content), headers=headers)
        for content in (png(), png(), png(30, 30))
    ]
    assert [response.status_code for response in sent] == [200, 200, 409]
    assert sent[0].json()["id"] == sent[1].json()["id"]


def test_what_led_a_video_is_given_again_to_remix_it(
    engine: Engine, door: Door, alice: Account, clip: Callable[[int], bytes]
) -> None:
    _, job = admitted(engine, door, {"files": form({"control": "canny"}, png())})
    end_next_job(engine, door.store, content=clip(5))
    call = door.as_account()
    path = f"/v1/videos/{job.id}/remix"
    refused = call("POST", path, json={"prompt": "y"})
    assert refused.json()["error"]["param"] == "control_reference"
    remixed = call("POST", path, files={**form({"control": "depth"}, png())})
    assert remixed.status_code == 200, remixed.text
    assert remixed.json()["control"]["type"] == "depth"


def test_a_models_entry_says_what_may_lead_it(door: Door, alice: Account) -> None:
    listed = {entry["id"]: entry for entry in door.as_account()("GET", "/v1/models").json()["data"]}
    union = {"id": "union", "frames": "all"}
    assert listed["z-image-video"]["inputs"]["control"] == {"canny": union, "depth": union}
    assert listed["animatediff"]["inputs"]["control"] == {
        "canny": {"id": "controlnet", "frames": "all"},
        "rgb": {"id": "sparse-rgb", "frames": "some"},
        "scribble": {"id": "sparse-scribble", "frames": "some"},
    }
    taken = {name: entry["inputs"]["input_reference"] for name, entry in listed.items()}
    assert (taken["animatediff"], taken["plain"]) == ("optional", "refused")
