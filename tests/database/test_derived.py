"""Videos made from videos, as the official client asks for them: remix, edit, extend; and sync."""

import io
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, PermissionDeniedError
from PIL import Image
from pytest_httpserver import HTTPServer
from sqlalchemy import Engine

from credits.accounts import Account
from credits.plans import Plan
from jobs.job import Job, JobState
from jobs.store import get_job
from media.decode import VideoShape, read_shape
from media.encode import Mp4Encoder
from models.request import VideoRequest
from models.tensors import Frames
from tests.conftest import read_account
from tests.database.conftest import Door, end_next_job, job_now, png

AJob = Callable[..., Job]
AnAccount = Callable[..., Account]
Official = Callable[..., OpenAI]


def write_mp4(path: Path, num_frames: int = 9, size: tuple[int, int] = (64, 64)) -> bytes:
    """Frames that grow lighter, at 8 a second."""
    shades = np.linspace(0, 255, num_frames).astype(np.uint8)
    pixels = np.broadcast_to(shades[:, None, None, None], (num_frames, size[1], size[0], 3)).copy()
    with Mp4Encoder(path, width=size[0], height=size[1], fps=8, threads=1) as encoder:
        encoder.write(Frames(pixels, 8))
        encoder.finish()
    return path.read_bytes()


@pytest.fixture
def mp4(tmp_path: Path) -> bytes:
    return write_mp4(tmp_path / "made.mp4")


@pytest.fixture
def client(alice: Account, official: Official) -> OpenAI:
    return official()


def finish(engine: Engine, door: Door, content: bytes) -> Job:
    return end_next_job(engine, door.store, content=content)


def request_of(engine: Engine, video_id: str) -> VideoRequest:
    with engine.begin() as connection:
        return VideoRequest.model_validate(get_job(connection, video_id).request)


def shade(content: bytes) -> float:
    with Image.open(io.BytesIO(content)) as image:
        return float(np.asarray(image).mean())


@pytest.fixture
def finished(engine: Engine, door: Door, alice: Account, a_job: AJob, mp4: bytes) -> Job:
    a_job(alice, seed=5, negative_prompt="grey", num_frames=9, flow_shift=4.0)
    return finish(engine, door, mp4)


def test_a_remix_keeps_all_but_the_words(engine: Engine, client: OpenAI, finished: Job) -> None:
    video = client.videos.remix(finished.id, prompt="a blue square")
    assert video.remixed_from_video_id == finished.id
    former = VideoRequest.model_validate(finished.request)
    expected = former.model_copy(update={"prompt": "a blue square", "remixed_from": finished.id})
    assert request_of(engine, video.id) == expected


def test_a_remix_of_an_image_to_video_starts_from_the_same_frame(
    engine: Engine, door: Door, alice: Account, client: OpenAI, mp4: bytes
) -> None:
    client.videos.create(prompt="x", input_reference=png())
    first = finish(engine, door, mp4)
    video = client.videos.remix(first.id, prompt="y")
    assert shade(door.store.get(f"inputs/{video.id}")) < 20
    assert list(door.store.list(f"inputs/{first.id}")) == []


def test_a_remix_takes_settings_and_refuses_what_is_not_done(
    engine: Engine, door: Door, alice: Account, an_account: AnAccount, a_job: AJob,
    client: OpenAI, official: Official, finished: Job,
) -> None:  # fmt: skip
    changed = {"size": "32x32", "seconds": "2", "seed": 6}
    video = client.videos.remix(finished.id, prompt="y", extra_body=changed)
    made = request_of(engine, video.id)
    assert (made.width, made.height, made.num_frames, made.seed) == (32, 32, 16, 6)
    running = a_job(alice)
    call = door.as_account()
    assert call("POST", f"/v1/videos/{running.id}/remix", json={"prompt": "y"}).status_code == 409
    refused = call("POST", f"/v1/videos/{finished.id}/remix", json={})
    assert refused.json()["error"]["param"] == "prompt"
    an_account("bob")
    with pytest.raises(NotFoundError):
        official("bob").videos.remix(finished.id, prompt="y")


def test_an_edit_takes_an_upload_and_its_shape(
    engine: Engine, door: Door, client: OpenAI, mp4: bytes
) -> None:
    video = client.videos.edit(prompt="a red square", video=("x.mp4", mp4))
    made = request_of(engine, video.id)
    assert (made.width, made.height, made.num_frames, made.fps) == (64, 64, 9, 8)
    assert made.strength == 0.6
    assert made.source_video is not None
    assert door.store.get(made.source_video) == mp4


def test_an_edit_at_another_rate_is_as_long(door: Door, client: OpenAI, mp4: bytes) -> None:
    video = client.videos.edit(prompt="x", video=("x.mp4", mp4), extra_body={"fps": "16"})
    assert (video.seconds, video.model_dump()["num_frames"]) == ("1.125", 18)


def test_what_a_file_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    """Its title looks like what ffmpeg says of a stream, very often."""
    write_mp4(tmp_path / "plain.mp4")
    lie = "Stream #0:0: Video: h264, 9999x9999, 99 fps\r" * 4000
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", "plain.mp4"]
    (tmp_path / "title.txt").write_text(";FFMETADATA1\ntitle=" + lie.replace("#", "\\#"))
    merged = ["-i", "title.txt", "-map_metadata", "1", "-codec", "copy", "titled.mp4"]
    subprocess.run([*command, *merged], cwd=tmp_path, check=True)
    started_s = time.monotonic()
    assert read_shape(tmp_path / "titled.mp4") == VideoShape(64, 64, 8)
    assert time.monotonic() - started_s < 5


def test_an_edit_of_a_video_made_here_outlives_it(
    engine: Engine, door: Door, client: OpenAI, finished: Job, mp4: bytes
) -> None:
    body = {"prompt": "y", "video": {"id": finished.id}, "strength": 0.3, "size": "32x32"}
    video = door.as_account()("POST", "/v1/videos/edits", json=body).json()
    client.videos.delete(finished.id)
    made = request_of(engine, video["id"])
    assert (made.strength, made.width) == (0.3, 32)
    assert made.source_video is not None
    assert door.store.get(made.source_video) == mp4
    ended = finish(engine, door, mp4)
    assert list(door.store.list(f"inputs/{ended.id}")) == []


def test_an_extension_of_an_upload_by_the_official_client(
    engine: Engine, client: OpenAI, mp4: bytes
) -> None:
    video = client.videos.extend(prompt="y", seconds="2", video=("x.mp4", mp4))  # type: ignore[arg-type]
    made = request_of(engine, video.id)
    assert (made.num_frames, made.continued_frames, video.seconds) == (17, 9, "3.125")


def test_an_extension_bills_its_new_frames_and_tells_the_whole_length(
    engine: Engine, door: Door, alice: Account, client: OpenAI, finished: Job
) -> None:
    before = read_account(engine, "alice")
    body = {"prompt": "y", "video": finished.id, "seconds": "2"}
    video = door.as_account()("POST", "/v1/videos/extensions", json=body).json()
    made = request_of(engine, video["id"])
    assert (made.num_frames, made.new_frames, made.continued_frames) == (17, 16, 9)
    assert (video["seconds"], video["total_frames"]) == ("3.125", 25)
    assert before.available - read_account(engine, "alice").available == 2 * 16
    assert made.start_image is not None
    assert shade(door.store.get(made.start_image)) > 235


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("edits", {}, "video"),
        ("edits", {"video": b"no video"}, "video"),
        ("edits", {"video": png()}, "video"),
        ("edits", {"video": "long"}, "video"),
        ("edits", {"video": "mp4", "strength": "2"}, "strength"),
        ("edits", {"video": "mp4", "size": "63x64"}, "size"),
        ("edits", {"video": "mp4", "num_frames": "10"}, "num_frames"),
        ("edits", {"video": "mp4", "fps": "fast"}, "fps"),
        ("extensions", {}, "video"),
        ("extensions", {"video": "mp4", "size": "64x64"}, "size"),
        ("extensions", {"video": "mp4", "strength": "0.5"}, "strength"),
        ("extensions", {"video": "mp4", "num_frames": "0"}, "num_frames"),
        ("extensions", {"video": "mp4", "num_frames": "32"}, "video"),
        ("extensions", {"video": "mp4", "num_frames": "9" * 5000}, "num_frames"),
        ("extensions", {"video": "mp4", "crop": '{"x":0,"y":0,"width":9,"height":9}'}, "crop"),
        ("extensions", {"video": "mp4", "seconds": "99"}, "num_frames"),
    ],
)
def test_a_source_that_cannot_be_used_is_400_and_costs_nothing(
    engine: Engine, door: Door, alice: Account, mp4: bytes, tmp_path: Path, path: str,
    fields: dict[str, Any], param: str,
) -> None:  # fmt: skip
    sources = {"mp4": mp4, "long": write_mp4(tmp_path / "long.mp4", num_frames=41)}
    files = {}
    if "video" in fields:
        files["video"] = ("x.mp4", sources.get(fields["video"], fields["video"]))
    data = {"prompt": "x", **{k: v for k, v in fields.items() if k != "video"}}
    answer = door.as_account()("POST", f"/v1/videos/{path}", data=data, files=files or None)
    if not files:
        answer = door.as_account()("POST", f"/v1/videos/{path}", json=data)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert read_account(engine, "alice") == alice
    assert list(door.store.list("inputs/")) == []


def test_a_plan_without_image_to_video_has_no_edits(
    an_account: AnAccount, official: Official, mp4: bytes
) -> None:
    an_account("basic", plan=Plan.BASIC)
    with pytest.raises(PermissionDeniedError):
        official("basic").videos.edit(prompt="x", video=("x.mp4", mp4))


def test_characters_are_refused(client: OpenAI, mp4: bytes) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.videos.create_character(name="a", video=("x.mp4", mp4))
    assert refused.value.code == "not_supported"
    with pytest.raises(BadRequestError):
        client.videos.get_character("a")


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_sync_answers_when_the_video_is_there_or_never_will_be(
    engine: Engine, door: Door, alice: Account, mp4: bytes, state: JobState
) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(door.as_account()("POST", "/v1/videos/sync", json={"prompt": "x"}))

    thread = threading.Thread(target=ask)
    thread.start()
    while not door.wakes:
        assert thread.is_alive()
    job = end_next_job(engine, door.store, state, mp4)
    thread.join()
    answer = answers[0]
    if state is JobState.SUCCEEDED:
        assert (answer.status_code, answer.content) == (200, mp4)
        assert answer.headers["x-video-id"] == job.id
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "worker_lost")
        assert answer.headers["x-should-retry"] == "false"
        assert job_now(engine, job).charged == 0


def test_a_start_image_is_fetched_from_its_url(
    engine: Engine, door: Door, alice: Account, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/image").respond_with_data(png(30, 30))
    call = door.as_account()
    for field in ("input_reference", "reference_url"):
        body = {"prompt": "x", field: httpserver.url_for("/image")}
        video = call("POST", "/v1/videos", json=body).json()
        with Image.open(io.BytesIO(door.store.get(f"inputs/{video['id']}"))) as image:
            assert image.size == (64, 64)
    before = read_account(engine, "alice")
    httpserver.expect_request("/nothing").respond_with_data(status=404)
    body = {"prompt": "x", "input_reference": httpserver.url_for("/nothing")}
    refused = call("POST", "/v1/videos", json=body)
    assert refused.status_code == 400
    assert "status 404" in refused.json()["error"]["message"]
    assert read_account(engine, "alice") == before


@pytest.mark.parametrize("kind", ["edits", "extensions", "remix"])
def test_a_request_sent_again_is_answered_when_its_source_has_gone(
    engine: Engine, door: Door, alice: Account, finished: Job, kind: str
) -> None:
    path = f"/v1/videos/{finished.id}/remix" if kind == "remix" else f"/v1/videos/{kind}"
    body = {"prompt": "y"} if kind == "remix" else {"prompt": "y", "video": finished.id}
    call = door.as_account()
    headers = {"idempotency-key": "k"}
    first = call("POST", path, json=body, headers=headers)
    assert first.status_code == 200
    reserved = read_account(engine, "alice").reserved
    call("DELETE", f"/v1/videos/{finished.id}")
    again = call("POST", path, json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert read_account(engine, "alice").reserved == reserved
    assert call("POST", path, json=body).status_code == 404
    other = call("POST", path, json={**body, "seed": 1}, headers=headers)
    assert other.status_code == 409
