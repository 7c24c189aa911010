"""The rest of the HTTP surface on the real chain: videos from videos, live progress, webhooks."""

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import socketio
from PIL import Image
from pytest_httpserver import HTTPServer

from bench.clusters import Cluster
from client.client import Client
from tests.serve.conftest import read_mp4, wait_until
from tests.serve.test_chain import LONG, finish
from training.clips import Combination, draw_clip

pytestmark = pytest.mark.serve


@pytest.fixture
def client(cluster: Cluster) -> Client:
    return cluster.client


@pytest.fixture(scope="module")
def source(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished video: its id and its frames."""
    prompt = "a red circle moving right on a light background"
    video = cluster.client.create({"prompt": prompt, "seed": 1})
    finish(cluster.client, video["id"])
    path = tmp_path_factory.mktemp("source") / "source.mp4"
    cluster.client.download(video["id"], path)
    return {"id": video["id"], "path": path, "pixels": read_mp4(path).astype(int)}


def derive(client: Client, kind: str, path: Path, **fields: Any) -> tuple[dict[str, Any], Any]:
    """The finished video made from another, and its frames."""
    made = client.call("POST", f"/v1/videos/{kind}", json=fields)
    video = finish(client, made["id"])
    assert video["status"] == "completed", video
    client.download(made["id"], path)
    return video, read_mp4(path).astype(int)


def test_an_extension_is_the_video_and_what_follows(
    client: Client, source: dict[str, Any], tmp_path: Path
) -> None:
    video, pixels = derive(
        client,
        "extensions",
        tmp_path / "x.mp4",
        prompt="a red circle moving right",
        video=source["id"],
        seconds="1",
        seed=2,
    )
    assert (len(pixels), video["seconds"], video["total_frames"]) == (13 + 8, "2.625", 21)
    assert np.abs(pixels[:13] - source["pixels"]).mean() < 3
    # The first new frame goes on from the last old one, rather than from anywhere.
    onward = np.abs(pixels[13] - pixels[12]).mean()
    assert onward < np.abs(pixels[0] - pixels[12]).mean()
    assert (video["quoted"], video["charged"]) == (16, 16)


def test_an_edit_stays_near_its_source_and_costs_what_is_made(
    client: Client, source: dict[str, Any], tmp_path: Path
) -> None:
    distances, charges = [], []
    for strength in (0.2, 1.0):
        video, pixels = derive(
            client,
            "edits",
            tmp_path / f"{strength}.mp4",
            prompt="a red circle moving right on a dark background",
            video=source["id"],
            strength=strength,
            seed=3,
        )
        distances.append(np.abs(pixels - source["pixels"]).mean())
        charges.append(video["charged"])
    assert distances[0] < distances[1] / 2
    assert charges == [7, 26]  # 26 x (10 + 90 x 4/20) / 100 and all of it


def test_a_remix_and_a_start_image_from_a_url(
    client: Client, source: dict[str, Any], httpserver: HTTPServer
) -> None:
    clip = draw_clip(Combination("green", "square", "right"), "dark", np.random.default_rng(3))
    content = io.BytesIO()
    Image.fromarray(clip.pixels[0]).save(content, "PNG")
    httpserver.expect_request("/image").respond_with_data(content.getvalue())
    fields = {"prompt": "a green square", "num_steps": 2}
    made = client.create({**fields, "input_reference": httpserver.url_for("/image")})
    assert finish(client, made["id"])["image_to_video"] is True
    remix = client.call(
        "POST", f"/v1/videos/{source['id']}/remix", json={"prompt": "a blue circle moving right"}
    )
    video = finish(client, remix["id"])
    assert (video["status"], video["remixed_from_video_id"], video["seed"]) == (
        "completed",
        source["id"],
        1,
    )


def test_sync_answers_with_the_file(cluster: Cluster) -> None:
    headers = {"authorization": f"Bearer {cluster.server.api_key}"}
    with httpx.Client(timeout=60, headers=headers) as http:
        answer = http.post(
            f"{cluster.server.url}/v1/videos/sync", json={"prompt": "x", "num_steps": 2}
        )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.content[4:8] == b"ftyp"


def test_progress_comes_over_socket_io(cluster: Cluster) -> None:
    """Through Serve's proxy, as a browser asks for it."""
    heard: list[tuple[str, dict[str, Any]]] = []

    async def watch() -> None:
        over = asyncio.Event()
        watcher = socketio.AsyncClient()

        @watcher.on("*")
        async def hear(name: str, content: dict[str, Any]) -> None:
            heard.append((name, content))
            if name != "progress":
                over.set()

        await watcher.connect(
            cluster.server.url,
            auth={"token": cluster.server.api_key},
            socketio_path="/ws/socket.io",
            transports=["websocket"],
        )
        video = await asyncio.to_thread(cluster.client.create, {"prompt": "x", "num_steps": 5})
        assert await watcher.call("subscribe", {"video_id": video["id"]}) == {"ok": True}
        async with asyncio.timeout(60):
            await over.wait()
        await watcher.disconnect()

    asyncio.run(watch())
    assert heard[-1][0] == "completed"
    steps = [content["step"] for _, content in heard if content["phase"] == "denoise"]
    assert steps[-5:] == [1, 2, 3, 4, 5]


def test_a_webhook_is_told_when_the_video_is_there(
    cluster: Cluster, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/hook").respond_with_data(status=204)
    with openai.OpenAI(
        base_url=f"{cluster.server.url}/v1", api_key=cluster.server.api_key
    ) as official:
        url = httpserver.url_for("/hook")
        endpoint = official.webhooks.create(name="", url=url, event_types=["video.completed"])
        video = official.videos.create_and_poll(prompt="x")
        wait_until(lambda: bool(httpserver.log), 30)
        told = httpserver.log[0][0]
        event: Any = official.webhooks.unwrap(
            told.get_data(), dict(told.headers), secret=endpoint.signing_secret
        )
        assert (event.type, event.data.id) == ("video.completed", video.id)
        official.webhooks.delete(endpoint.id)


def test_the_official_client_polls_on_while_every_ingress_is_killed(cluster: Cluster) -> None:
    with openai.OpenAI(
        base_url=f"{cluster.server.url}/v1", api_key=cluster.server.api_key, max_retries=8
    ) as official:
        video = official.videos.create(prompt=LONG["prompt"], extra_body=LONG)  # type: ignore[arg-type]
        cluster.kill("Ingress")
        done = official.videos.poll(video.id)
        assert done.status == "completed"
        assert official.videos.download_content(done.id).read()[4:8] == b"ftyp"
