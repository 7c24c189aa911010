"""Webhooks: the official client makes endpoints and unwraps what they are sent; none is lost."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, NotFoundError, OpenAI
from sqlalchemy import Engine, update

from credits.accounts import Account
from credits.pricing import WorkWeights
from deployments.settlement import Ending, WorkDone, cancel, settle
from deployments.url_guard import UrlGuardConfig
from deployments.webhooks import WebhookConfig, WebhookSender
from jobs.job import Job, JobState
from jobs.webhooks import webhook_deliveries
from tests.conftest import PEPPER
from tests.database.conftest import LOOPBACK, Door, lease_now

AnAccount = Callable[..., Account]
AJob = Callable[..., Job]


class Receiver:
    """An HTTP server that keeps what it is sent and answers with the statuses that it is given."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], str]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.received.append((headers, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Keep the tests' output clean."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


@pytest.fixture
def sender(engine: Engine) -> WebhookSender:
    return WebhookSender(engine, PEPPER, WebhookConfig(guard=LOOPBACK, backoff_s=(0.0, 0.0)))


@pytest.fixture
def client(door: Door, alice: Account) -> OpenAI:
    return official_client(door, "alice")


def official_client(door: Door, account_id: str) -> OpenAI:
    return OpenAI(
        base_url="http://testserver/v1",
        api_key=f"key-{account_id}",
        http_client=door.client,
        max_retries=0,
    )


def deliver_all(sender: WebhookSender) -> int:
    count = 0
    while (claimed := sender.claim()) is not None:
        asyncio.run(sender.deliver(claimed))
        count += 1
    return count


def end(engine: Engine, door: Door, state: JobState) -> str:
    job = lease_now(engine)
    assert job is not None
    key = f"videos/{job.id}.mp4" if state is JobState.SUCCEEDED else None
    ending = Ending(state, "over", charge_work=False, video_key=key)
    settle(engine, door.store, WorkWeights(), job, lease_owner="me", done=WorkDone(), ending=ending)
    return job.id


def test_the_official_client_unwraps_what_its_endpoint_is_sent(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender,
) -> None:  # fmt: skip
    types: Any = ["video.completed", "video.failed"]
    endpoint = client.webhooks.create(name="mine", url=receiver.url, event_types=types)
    ended = []
    for state in (JobState.SUCCEEDED, JobState.FAILED):
        a_job(alice)
        ended.append(end(engine, door, state))
    cancelled = a_job(alice)
    cancel(engine, door.store, WorkWeights(), cancelled)
    assert deliver_all(sender) == 3
    events: list[Any] = [
        client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
        for headers, body in receiver.received
    ]
    assert [(event.type, event.data.id) for event in events] == [
        ("video.completed", ended[0]),
        ("video.failed", ended[1]),
        ("video.failed", cancelled.id),
    ]
    headers, body = receiver.received[0]
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + " ", headers, secret=endpoint.signing_secret)
    assert deliver_all(sender) == 0


def test_an_endpoint_is_told_only_what_it_asks_for_and_of_its_own_account(
    engine: Engine, door: Door, alice: Account, an_account: AnAccount, a_job: AJob, client: OpenAI,
    receiver: Receiver, sender: WebhookSender,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.failed"])
    bob = an_account("bob")
    a_job(alice)
    end(engine, door, JobState.SUCCEEDED)
    a_job(bob)
    end(engine, door, JobState.FAILED)
    assert deliver_all(sender) == 0


def test_an_endpoint_that_fails_is_tried_again_under_the_same_id_and_then_dead(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    a_job(alice)
    end(engine, door, JobState.SUCCEEDED)
    receiver.statuses = [500, 302, 404]
    assert deliver_all(sender) == 3
    assert len({(headers["webhook-id"], body) for headers, body in receiver.received}) == 1
    call = door.as_account()
    dead = call("GET", "/v1/webhook_deliveries?state=dead").json()["data"]
    assert [(row["attempts"], row["last_error"]) for row in dead] == [(3, "status 404")]
    again = call("POST", f"/v1/webhook_deliveries/{dead[0]['id']}/retry")
    assert again.json()["state"] == "pending"
    assert deliver_all(sender) == 1
    assert call("GET", "/v1/webhook_deliveries?state=delivered").json()["data"][0]["attempts"] == 1


def test_a_sender_that_is_killed_leaves_its_delivery_to_the_next(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    a_job(alice)
    end(engine, door, JobState.SUCCEEDED)
    assert sender.claim() is not None  # and nothing more is heard of it
    assert sender.claim() is None
    with engine.begin() as connection:  # as if its lease had run out
        connection.execute(update(webhook_deliveries).values(next_at_ms=0))
    assert deliver_all(sender) == 1
    assert len(receiver.received) == 1


def test_of_many_senders_each_delivery_is_sent_by_one(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.failed"])
    for _ in range(6):
        a_job(alice)
        end(engine, door, JobState.FAILED)
    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(lambda _: deliver_all(sender), range(4)))
    assert sum(counts) == 6
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 6


def test_a_settlement_that_fails_announces_nothing(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    a_job(alice)

    def fail(*arguments: object, **named: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("deployments.settlement.settle_reservation", fail)
    with pytest.raises(ConnectionError):
        end(engine, door, JobState.SUCCEEDED)
    assert deliver_all(sender) == 0


def test_endpoints_are_managed_by_the_official_client(
    door: Door, an_account: AnAccount, client: OpenAI, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=["video.failed"])
    assert made.signing_secret.startswith("whsec_")
    shown = client.webhooks.retrieve(made.id)
    assert (shown.name, shown.event_types) == ("a", ["video.failed"])
    assert made.signing_secret not in shown.model_dump_json()
    assert client.webhooks.update(made.id, name="b").name == "b"
    assert [endpoint.id for endpoint in client.webhooks.list()] == [made.id]
    assert client.webhooks.event_types.list().data == ["video.completed", "video.failed"]
    tested = client.webhooks.test(made.id, event_type="video.failed")
    assert (tested.status_code, tested.success) == (204, True)
    an_account("bob")
    with pytest.raises(NotFoundError):
        official_client(door, "bob").webhooks.delete(made.id)
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.webhooks.retrieve(made.id)


@pytest.mark.parametrize("keep", [True, False])
def test_a_rotated_secret_signs_and_the_old_one_for_a_day_if_asked(
    client: OpenAI, receiver: Receiver, keep: bool
) -> None:
    made = client.webhooks.create(name="", url=receiver.url, event_types=["video.failed"])
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=keep)
    assert rotated.signing_secret != made.signing_secret
    client.webhooks.test(made.id, event_type="video.failed")
    headers, body = receiver.received[0]
    client.webhooks.unwrap(body, headers, secret=rotated.signing_secret)
    if keep:
        client.webhooks.unwrap(body, headers, secret=made.signing_secret)
    else:
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers, secret=made.signing_secret)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": "ftp://example.com"},
        {"url": "https://user:password@example.com"},
        {"url": "https://"},
        {"url": "https://example.com", "event_types": []},
        {"url": "https://example.com", "event_types": ["video.started"]},
        {"url": "https://example.com", "name": "\u0000"},
        {"url": "https://example.com", "secret": "mine"},
    ],
)
def test_an_endpoint_that_cannot_be_is_400(door: Door, alice: Account, body: Any) -> None:
    answer = door.as_account()("POST", "/v1/webhook_endpoints", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in {"url", "event_types", "name", "secret", "0"}


def test_an_endpoint_inside_the_network_is_never_sent_anything(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver
) -> None:
    client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    a_job(alice)
    end(engine, door, JobState.SUCCEEDED)
    guard = UrlGuardConfig(allow_http=True)
    sender = WebhookSender(engine, PEPPER, WebhookConfig(guard=guard, backoff_s=()))
    assert deliver_all(sender) == 1
    assert receiver.received == []
    dead = door.as_account()("GET", "/v1/webhook_deliveries?state=dead").json()["data"]
    assert "not on the public internet" in dead[0]["last_error"]
