"""The official client, unchanged, where what it sends is unusual: JSON, links, lists, retries."""

import base64
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from pytest_httpserver import HTTPServer
from sqlalchemy import Engine

from credits.accounts import Account
from tests.conftest import read_account
from tests.database.conftest import png

Official = Callable[..., OpenAI]


class LosesAnswers(httpx2.HTTPTransport):
    """Sends every request, and loses what the first ones are answered."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count
        self.retries: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        self.retries.append(request.headers["x-stainless-retry-count"])
        if self.left:
            self.left -= 1
            response.read()
            raise httpx2.ReadTimeout("lost", request=request)
        return response


def picture(httpserver: HTTPServer, kind: str) -> str:
    if kind == "link":
        httpserver.expect_request("/x.png").respond_with_data(png(32, 32))
        return httpserver.url_for("/x.png")
    return "data:image/png;base64," + base64.b64encode(png(32, 32)).decode()


@pytest.mark.parametrize("kind", ["link", "data"])
def test_a_start_image_by_its_address(
    alice: Account, official: Official, httpserver: HTTPServer, kind: str
) -> None:
    body = {"input_reference": {"image_url": picture(httpserver, kind)}}
    video: Any = official().videos.create(prompt="x", extra_body=body)
    assert video.status == "queued"
    assert video.image_to_video


def test_lists_and_numbers_beyond_its_own_fields(alice: Account, official: Official) -> None:
    body = {"tags": ["a", "b"], "num_frames": 14, "guidance_scale": 1.5, "seed": 3}
    video: Any = official().videos.create(prompt="x", size="64x64", extra_body=body)  # type: ignore[arg-type]
    assert video.tags == ["a", "b"]
    assert (video.num_frames, video.guidance_scale, video.seed) == (14, 1.5, 3)
    assert [each.id for each in official().videos.list()] == [video.id]


def test_a_body_in_json(alice: Account, official: Official) -> None:
    body = {"prompt": "x", "tags": ["a"], "fps": 7}
    video: Any = official().post("/videos", body=body, cast_to=object)
    assert (video["tags"], video["fps"], video["object"]) == (["a"], 7, "video")


@pytest.mark.parametrize("kind", ["form", "json", "image"])
def test_its_own_retries_make_one_job(engine: Engine, alice: Account, url: str, kind: str) -> None:
    transport = LosesAnswers(2)
    with OpenAI(
        base_url=f"{url}/v1",
        api_key="key-alice",
        http_client=httpx2.Client(transport=transport),
        max_retries=2,
    ) as client:
        match kind:
            case "form":
                made = client.videos.create(prompt="x").id
            case "image":
                made = client.videos.create(prompt="x", input_reference=png(32, 32)).id
            case _:
                answer: Any = client.post("/videos", body={"prompt": "x"}, cast_to=object)
                made = answer["id"]
        assert transport.retries == ["0", "1", "2"]
        assert [video.id for video in client.videos.list()] == [made]
    assert read_account(engine, "alice").open_reservations == 1


def test_what_is_refused_is_not_sent_again(
    engine: Engine, an_account: Callable[..., Account], url: str
) -> None:
    an_account("alice", credits=0)
    transport = LosesAnswers(0)
    with (
        OpenAI(
            base_url=f"{url}/v1",
            api_key="key-alice",
            http_client=httpx2.Client(transport=transport),
            max_retries=2,
        ) as client,
        pytest.raises(openai.APIStatusError) as refused,
    ):
        client.videos.create(prompt="x")
    assert refused.value.status_code == 402
    assert transport.retries == ["0"]


def test_one_model_by_its_name(alice: Account, official: Official) -> None:
    assert official().models.retrieve("z-image-video").owned_by == "mutoscope"
    with pytest.raises(openai.NotFoundError) as refused:
        official().models.retrieve("sora-2")
    assert refused.value.code == "model_not_found"
