"""Progress over Socket.IO and server-sent events: replayed, live, its owner's alone."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import socketio
from socketio.exceptions import ConnectionError as Refused
from sqlalchemy import Engine, text

from credits.accounts import Account, AccountId
from credits.api_keys import list_api_keys, revoke_api_key
from credits.pricing import WorkWeights
from deployments import listener
from deployments.live_progress import PATH
from deployments.settlement import Ending, WorkDone, settle
from jobs.job import Job, JobState, Phase, Progress
from jobs.store import record
from tests.database.conftest import Door, lease_now

AnAccount = Callable[..., Account]
AJob = Callable[..., Job]


class Watcher:
    """A Socket.IO client that keeps what it hears."""

    def __init__(self) -> None:
        self.client = socketio.AsyncClient()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.over = asyncio.Event()
        for name in ("progress", "completed", "failed"):
            self.client.on(name, self._listen_for(name))
        self.client.on("disconnect", self._end)

    def _listen_for(self, name: str) -> Callable[[dict[str, Any]], Awaitable[None]]:
        async def listen(content: dict[str, Any]) -> None:
            self.heard.append((name, content))
            if name != "progress":
                self.over.set()

        return listen

    async def _end(self) -> None:
        self.over.set()

    async def connect(self, url: str, key: str = "key-alice") -> None:
        await self.client.connect(
            url, auth={"token": key}, socketio_path=PATH, transports=["websocket"]
        )

    async def subscribe(self, video_id: object, after: object = 0) -> Any:
        return await self.client.call("subscribe", {"video_id": video_id, "after": after})


def watch(url: str, scenario: Callable[[Watcher], Awaitable[None]], key: str = "key-alice") -> None:
    async def run() -> None:
        watcher = Watcher()
        await watcher.connect(url, key)
        try:
            async with asyncio.timeout(20):
                await scenario(watcher)
        finally:
            await watcher.client.disconnect()

    asyncio.run(run())


def advance(engine: Engine, job: Job, step: int) -> None:
    with engine.begin() as connection:
        record(connection, job.id, "me", Progress(Phase.DENOISE, 10 * step, step, 3))


def end(engine: Engine, door: Door, job: Job) -> None:
    ending = Ending(JobState.SUCCEEDED, "done", charge_work=True, video_key=f"videos/{job.id}.mp4")
    settle(engine, door.store, WorkWeights(), job, lease_owner="me", done=WorkDone(), ending=ending)


def test_a_video_is_followed_from_the_first_event_to_the_last(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str
) -> None:
    job = a_job(alice)
    assert lease_now(engine) is not None
    advance(engine, job, 1)

    async def scenario(watcher: Watcher) -> None:
        assert await watcher.subscribe(job.id) == {"ok": True}
        await asyncio.to_thread(advance, engine, job, 2)
        await asyncio.to_thread(end, engine, door, job)
        await watcher.over.wait()
        assert [name for name, _ in watcher.heard] == 3 * ["progress"] + ["completed"]
        first, last = watcher.heard[1][1], watcher.heard[-1][1]
        assert (first["phase"], first["step"], first["num_steps"]) == ("denoise", 1, 3)
        assert first["percentage"] == 10
        assert first["eta_s"] >= 0
        assert last["video_url"] == f"/v1/videos/{job.id}/content"
        assert last["video"]["status"] == "completed"

    watch(url, scenario)


def test_what_was_seen_is_not_replayed(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str
) -> None:
    job = a_job(alice)
    assert lease_now(engine) is not None
    for step in (1, 2):
        advance(engine, job, step)
    end(engine, door, job)

    async def scenario(watcher: Watcher) -> None:
        await watcher.subscribe(job.id, after=2)
        await watcher.over.wait()
        assert [content["seq"] for _, content in watcher.heard] == [3, 4]

    watch(url, scenario)


def test_only_the_owner_is_told(
    engine: Engine, door: Door, alice: Account, an_account: AnAccount, a_job: AJob, url: str
) -> None:
    an_account("bob")
    job = a_job(alice)

    async def scenario(watcher: Watcher) -> None:
        assert (await watcher.subscribe(job.id))["error"]["code"] == "not_found"
        end_it = asyncio.to_thread(lease_now, engine)
        await end_it
        await asyncio.to_thread(end, engine, door, job)
        assert (await watcher.subscribe(5))["error"]["param"] == "video_id"
        assert (await watcher.subscribe(job.id, "x"))["error"]["param"] == "after"
        assert watcher.heard == []

    watch(url, scenario, "key-bob")


def test_a_wrong_key_does_not_connect(door: Door, alice: Account, url: str) -> None:
    async def nothing(_watcher: Watcher) -> None:
        raise AssertionError("connected")

    with pytest.raises(Refused):
        watch(url, nothing, "key-nobody")


def test_a_revoked_key_hears_no_more(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str
) -> None:
    job = a_job(alice)

    async def scenario(watcher: Watcher) -> None:
        await watcher.subscribe(job.id)
        with engine.begin() as connection:
            key = list_api_keys(connection, AccountId("alice"))[0]
            revoke_api_key(connection, key.id)
        await watcher.over.wait()
        assert {name for name, _ in watcher.heard} <= {"progress"}

    watch(url, scenario)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgresql_wakes_the_streams_without_polling(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = a_job(alice)
    assert lease_now(engine) is not None
    for interval in ("POLL_S", "LISTENING_POLL_S"):
        monkeypatch.setattr(listener, interval, 3600.0)

    async def scenario(watcher: Watcher) -> None:
        await watcher.subscribe(job.id)
        for step in (1, 2, 3):
            await asyncio.to_thread(advance, engine, job, step)
        await asyncio.to_thread(end, engine, door, job)
        await watcher.over.wait()
        assert len(watcher.heard) == 5

    watch(url, scenario)


def test_what_is_cancelled_has_failed(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str
) -> None:
    job = a_job(alice)

    async def scenario(watcher: Watcher) -> None:
        await watcher.subscribe(job.id)
        await asyncio.to_thread(door.as_account(), "DELETE", f"/v1/videos/{job.id}")
        await watcher.over.wait()
        name, content = watcher.heard[-1]
        assert (name, content["video"]["error"]["code"]) == ("failed", "cancelled")

    watch(url, scenario)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_stream_outlives_the_connections_that_it_hears_by(
    engine: Engine, door: Door, alice: Account, a_job: AJob, url: str
) -> None:
    job = a_job(alice)
    assert lease_now(engine) is not None

    def end_all_others() -> None:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        with engine.begin() as connection:
            connection.execute(
                text(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")
            )

    async def scenario(watcher: Watcher) -> None:
        await watcher.subscribe(job.id)
        for step in (1, 2, 3):
            await asyncio.to_thread(end_all_others)
            await asyncio.to_thread(advance, engine, job, step)
        await asyncio.to_thread(end, engine, door, job)
        await watcher.over.wait()
        assert [content["seq"] for _, content in watcher.heard] == [1, 2, 3, 4, 5]

    watch(url, scenario)
