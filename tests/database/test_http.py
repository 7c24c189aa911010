"""The HTTP surface: the wire shape of the Videos API, keys, limits, lists, content, events."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from credits.accounts import Account
from credits.pricing import WorkWeights
from deployments.settlement import Ending, WorkDone, settle
from jobs.job import JobState, Phase, Progress
from jobs.leases import lease
from jobs.store import record
from tests.conftest import read_account
from tests.database.conftest import Door, png

AnAccount = Callable[..., Account]


def run_to_success(engine: Engine, door: Door, video: bytes = b"0123456789") -> str:
    """Lease the next job and end it as its pipeline would; returns its id."""
    with engine.begin() as connection:
        job = lease(connection, "me", ["local"], 60_000)
        assert job is not None
        record(connection, job.id, "me", Progress(Phase.DENOISE, 40, 1, 3))
    key = f"videos/{job.id}.mp4"
    door.store.put(key, video)
    ending = Ending(
        JobState.SUCCEEDED, "done", charge_work=True, video_key=key, size_bytes=len(video)
    )
    done = WorkDone(1, 200, 200, 1)
    settle(engine, door.store, WorkWeights(), job, lease_owner="me", done=done, ending=ending)
    return job.id


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos"),
        ("GET", "/v1/videos/x"),
        ("DELETE", "/v1/videos/x"),
        ("GET", "/v1/videos/x/content"),
        ("GET", "/v1/videos/x/events"),
        ("GET", "/v1/models"),
        ("GET", "/v1/credits"),
        ("GET", "/v1/credits/entries?limit=0"),
        ("GET", "/v1/credits/entries.csv"),
        ("GET", "/v1/videos?limit=0"),
        ("GET", "/v1/keys"),
        ("DELETE", "/v1/keys/x"),
        ("POST", "/v1/keys/x/rotate"),
        ("POST", "/api/v1/video/estimate"),
        ("POST", "/api/v1/video/generate"),
    ],
)
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Basic key-alice", "Bearer"])
def test_without_a_key_everything_is_401(
    door: Door, alice: Account, method: str, path: str, key: str | None
) -> None:
    headers = {} if key is None else {"authorization": key}
    response = door.client.request(method, path, headers=headers, content=b"{")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "unauthenticated"


def test_another_accounts_video_is_404(engine: Engine, door: Door, an_account: AnAccount) -> None:
    for name in ("alice", "bob"):
        an_account(name)
    video = door.as_account("alice")("POST", "/v1/videos", json={"prompt": "x"}).json()
    run_to_success(engine, door)
    bob = door.as_account("bob")
    for method, suffix in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
        response = bob(method, f"/v1/videos/{video['id']}{suffix}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
    assert bob("GET", "/v1/videos").json()["data"] == []
    assert bob("GET", f"/v1/videos?after={video['id']}").status_code == 404


def test_no_credits_is_402_with_what_is_needed(door: Door, an_account: AnAccount) -> None:
    an_account("alice", credits=25)
    response = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
    assert response.status_code == 402
    error = response.json()["error"]
    assert (error["code"], error["needed"], error["available"]) == (
        "insufficient_credits",
        26,
        25,
    )


def test_the_plan_forbids_before_credits_are_counted(door: Door, an_account: AnAccount) -> None:
    an_account("alice", plan="basic", credits=0)
    response = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
    assert response.status_code == 403
    assert response.json()["error"]["param"] == "model"


def test_too_many_jobs_is_429_with_retry_after(door: Door, alice: Account) -> None:
    call = door.as_account()
    answers = [call("POST", "/v1/videos", json={"prompt": "x"}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert answers[-1].headers["retry-after"] == "5"


def test_generate_answers_202_with_job_and_price(door: Door, alice: Account) -> None:
    response = door.as_account()("POST", "/api/v1/video/generate", json={"prompt": "x"})
    assert response.status_code == 202
    content = response.json()
    assert content["job_id"] == content["video"]["id"]
    assert content["quoted"] == 26
    assert content["reservation_id"]


def test_an_estimate_shows_the_price_and_costs_nothing(
    engine: Engine, door: Door, alice: Account
) -> None:
    fields = {"num_frames": 49, "size": "512x512"}
    quote = door.as_account()("POST", "/api/v1/video/estimate", json=fields).json()
    assert quote["credits"] == 98
    assert quote["factors"] == {
        "base": 1,
        "num_frames": 49,
        "resolution_multiplier": 1.0,
        "model_multiplier": 2.0,
    }
    assert read_account(engine, "alice") == alice


def test_a_finished_video_shows_its_bill_and_content(
    engine: Engine, door: Door, alice: Account
) -> None:
    call = door.as_account()
    call("POST", "/v1/videos", json={"prompt": "x"})
    video_id = run_to_success(engine, door)
    response = call("GET", f"/v1/videos/{video_id}")
    assert "openai-poll-after-ms" not in response.headers
    video = response.json()
    assert (video["status"], video["progress"]) == ("completed", 100)
    assert (video["quoted"], video["charged"], video["refunded"]) == (26, 26, 0)
    assert call("GET", "/v1/credits").json() == {
        "plan": "enterprise",
        "available": 974,
        "reserved": 0,
        "spent": 26,
    }
    whole = call("GET", f"/v1/videos/{video_id}/content")
    assert (whole.content, whole.headers["content-type"]) == (b"0123456789", "video/mp4")
    part = call("GET", f"/v1/videos/{video_id}/content", headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    assert part.headers["content-range"] == "bytes 2-4/10"
    beyond = call("GET", f"/v1/videos/{video_id}/content", headers={"range": "bytes=99-"})
    assert beyond.status_code == 416
    assert call("GET", f"/v1/videos/{video_id}/content?variant=gif").status_code == 400


def test_content_before_the_end_is_409(door: Door, alice: Account) -> None:
    call = door.as_account()
    video = call("POST", "/v1/videos", json={"prompt": "x"}).json()
    response = call("GET", f"/v1/videos/{video['id']}/content")
    assert response.status_code == 409
    assert response.headers["x-should-retry"] == "false"


def test_pages_follow_the_cursor(engine: Engine, door: Door, alice: Account) -> None:
    call = door.as_account()
    ids = []
    for _ in range(5):
        ids.append(call("POST", "/v1/videos", json={"prompt": "x"}).json()["id"])
        run_to_success(engine, door)
    first = call("GET", "/v1/videos?limit=2").json()
    assert first["object"] == "list"
    assert [video["id"] for video in first["data"]] == [ids[4], ids[3]]
    assert (first["first_id"], first["last_id"], first["has_more"]) == (ids[4], ids[3], True)
    rest = call("GET", f"/v1/videos?limit=3&after={ids[3]}").json()
    assert [video["id"] for video in rest["data"]] == [ids[2], ids[1], ids[0]]
    assert not rest["has_more"]
    ascending = call("GET", "/v1/videos?order=asc").json()
    assert [video["id"] for video in ascending["data"]] == ids
    assert call("DELETE", f"/v1/videos/{ids[3]}").status_code == 200
    after_deleted = call("GET", f"/v1/videos?limit=3&after={ids[3]}").json()
    assert after_deleted["data"] == rest["data"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up"])
def test_a_wrong_page_names_its_parameter(door: Door, alice: Account, query: str) -> None:
    response = door.as_account()("GET", f"/v1/videos?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.split("=")[0]


def test_cancelling_a_queued_video_refunds_it_and_leaves_a_receipt(
    engine: Engine, door: Door, alice: Account
) -> None:
    call = door.as_account()
    files = {"input_reference": ("x.png", png())}
    video = call("POST", "/v1/videos", data={"prompt": "x"}, files=files).json()
    path = f"/v1/videos/{video['id']}"
    assert call("DELETE", path).json() == {
        "id": video["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    receipt = call("GET", path).json()
    assert (receipt["status"], receipt["error"]["code"]) == ("failed", "cancelled")
    assert (receipt["charged"], receipt["refunded"]) == (0, 26)
    assert read_account(engine, "alice") == alice
    assert list(door.store.list("")) == []
    call("DELETE", path)
    assert call("GET", path).status_code == 404


def test_deleting_a_running_video_asks_its_pipeline(
    engine: Engine, door: Door, alice: Account
) -> None:
    call = door.as_account()
    video = call("POST", "/v1/videos", json={"prompt": "x"}).json()
    with engine.begin() as connection:
        lease(connection, "me", ["local"], 60_000)
    assert call("DELETE", f"/v1/videos/{video['id']}").status_code == 200
    assert call("GET", f"/v1/videos/{video['id']}").json()["status"] == "in_progress"
    assert read_account(engine, "alice").reserved == 26
    assert len(door.wakes) == 2


def read_events(response: Any) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


def test_events_replay_and_end_with_the_video(engine: Engine, door: Door, alice: Account) -> None:
    call = door.as_account()
    call("POST", "/v1/videos", json={"prompt": "x"})
    video_id = run_to_success(engine, door)
    response = call("GET", f"/v1/videos/{video_id}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response)
    assert [(seq, kind) for seq, kind, _ in events] == [
        (1, "progress"),
        (2, "progress"),
        (3, "completed"),
    ]
    assert events[-1][2]["video"]["charged"] == 26
    headers = {"last-event-id": "1"}
    rest = read_events(call("GET", f"/v1/videos/{video_id}/events", headers=headers))
    assert [seq for seq, _, _ in rest] == [2, 3]
    seen = call("GET", f"/v1/videos/{video_id}/events", headers={"last-event-id": "3"})
    assert seen.text == ""


@pytest.mark.parametrize("seq", ["x", "-1", "1" * 20])
def test_a_wrong_last_event_id_is_400(door: Door, alice: Account, seq: str) -> None:
    call = door.as_account()
    video = call("POST", "/v1/videos", json={"prompt": "x"}).json()
    headers = {"last-event-id": seq}
    response = call("GET", f"/v1/videos/{video['id']}/events", headers=headers)
    assert response.status_code == 400


def test_models_are_listed(door: Door, alice: Account) -> None:
    models = door.as_account()("GET", "/v1/models").json()
    assert models["object"] == "list"
    assert models["data"][0]["id"] == "z-image-video"
    assert models["data"][0]["f_patch_sizes"] == [1, 2, 4]


def test_health_and_openapi_need_no_key(door: Door) -> None:
    assert door.client.get("/healthz").json() == {"status": "ok"}
    assert "/v1/videos" in door.client.get("/openapi.json").json()["paths"]
