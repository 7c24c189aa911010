"""The ingress over a real database, without Ray."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from PIL import Image
from sqlalchemy import Engine
from starlette.testclient import TestClient

from autoscaling.tiers import GpuTier, ServedOn
from bench.clusters import no_pools
from credits.accounts import Account
from credits.plans import Plan, PlanTable
from credits.pricing import PriceTable, WorkWeights
from credits.rates import RequestRate
from deployments.admission import Admission, Offer
from deployments.config import LimitsConfig
from deployments.database import reader
from deployments.ingress import IngressParts, create_app
from deployments.settlement import Ending, WorkDone, settle
from deployments.url_guard import UrlGuardConfig
from deployments.webhooks import WebhookConfig
from jobs.job import Job, JobState
from jobs.leases import lease
from jobs.store import get_job
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.request import VideoRequest
from models.start_image import ImageLimits
from tests.conftest import ADMIN_KEY, PEPPER

LOOPBACK = UrlGuardConfig(
    allow_http=True, allowed_networks=(IPv4Network("127.0.0.0/8"),), timeout_s=5.0
)


@dataclass
class Door:
    """The application as an HTTP client sees it, and how often it woke the pipeline."""

    client: TestClient
    store: LocalObjectStore
    admission: Admission
    wakes: list[None] = field(default_factory=list)

    def as_account(self, account_id: str = "alice") -> "Caller":
        return Caller(self.client, {"authorization": f"Bearer key-{account_id}"})


@dataclass
class Caller:
    """One account's requests."""

    client: TestClient
    headers: dict[str, str]

    def __call__(self, method: str, path: str, **arguments: Any) -> Any:
        headers = {**self.headers, **arguments.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **arguments)


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path / "store")


@pytest.fixture
def request_rates() -> dict[Plan, RequestRate]:
    """No limits; a module of tests may say otherwise."""
    return {}


@pytest.fixture
def parts(
    database_url: str,
    store: LocalObjectStore,
    model: Model,
    request_rates: dict[Plan, RequestRate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> IngressParts:
    """What an ingress replica is made of."""
    monkeypatch.setenv("MUTOSCOPE_PEPPER", PEPPER.decode())
    monkeypatch.setenv("MUTOSCOPE_ADMIN_KEY", ADMIN_KEY)
    return IngressParts(
        home=tmp_path,
        database_url=database_url,
        local_account=None,
        store=store,
        offers={model.id: Offer(model, (ServedOn(tier=GpuTier.LOCAL),))},
        prices=PriceTable(),
        plans=PlanTable(),
        weights=WorkWeights(),
        limits=LimitsConfig(
            max_body_bytes=200_000,
            max_source_frames=40,
            image=ImageLimits(max_pixels=10_000),
        ),
        rates=request_rates,
        webhooks=WebhookConfig(guard=LOOPBACK),
        image_urls=LOOPBACK,
    )


@pytest.fixture
def door(engine: Engine, parts: IngressParts) -> Iterator[Door]:
    wakes: list[None] = []
    app = create_app(parts, lambda: wakes.append(None), no_pools)
    with TestClient(app, raise_server_exceptions=False) as client:
        admission = Admission(engine, parts.store, parts.offers, parts.prices, parts.plans)
        yield Door(client, parts.store, admission, wakes)


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL of an application behind a real server."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def url(engine: Engine, parts: IngressParts) -> Iterator[str]:
    """A replica of the door's on a port of its own."""
    with served(create_app(parts, lambda: None, no_pools)) as url:
        yield url


@pytest.fixture
def alice(an_account: Callable[..., Account]) -> Account:
    return an_account("alice")


@pytest.fixture
def a_job(door: Door, a_request: Callable[..., VideoRequest]) -> Callable[..., Job]:
    """Admits a job of an account."""

    def make(account: Account, **fields: Any) -> Job:
        return door.admission.admit(account, a_request(**fields))

    return make


@pytest.fixture
def official(url: str) -> Iterator[Callable[..., OpenAI]]:
    """Makes the official client of an account, of a replica that is really served."""
    with contextlib.ExitStack() as clients:

        def make(account_id: str = "alice", at: str = url) -> OpenAI:
            client = OpenAI(base_url=f"{at}/v1", api_key=f"key-{account_id}", max_retries=0)
            return clients.enter_context(client)

        yield make


def end_next_job(
    engine: Engine,
    store: LocalObjectStore,
    state: JobState = JobState.SUCCEEDED,
    content: bytes = b"video",
) -> Job:
    """Lease the next job and end it as its pipeline would, with that file if it succeeded."""
    job = lease_now(engine)
    assert job is not None
    is_made = state is JobState.SUCCEEDED
    key = f"videos/{job.id}.mp4"
    if is_made:
        store.put(key, content)
    ending = Ending(
        state,
        "over",
        charge_work=is_made,
        video_key=key if is_made else None,
        size_bytes=len(content) if is_made else None,
        error_code=None if is_made else "worker_lost",
        error_message=None if is_made else "lost",
    )
    done = WorkDone(1, 200, 200, 1)
    settle(engine, store, WorkWeights(), job, lease_owner="me", done=done, ending=ending)
    return job


def lease_now(engine: Engine, owner: str = "me", lease_ms: int = 60_000) -> Job | None:
    with engine.begin() as connection:
        return lease(connection, owner, ["local"], lease_ms)


def job_now(engine: Engine, job: Job) -> Job:
    with reader(engine).begin() as connection:
        return get_job(connection, job.id)


def png(width: int = 20, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
