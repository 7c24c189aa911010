"""Webhooks: the official client makes endpoints and unwraps what they are sent; none is lost."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, NotFoundError, OpenAI
from pytest_httpserver import HTTPServer
from sqlalchemy import Engine, update
from werkzeug import Request, Response

from credits.accounts import Account
from credits.pricing import WorkWeights
from deployments.settlement import cancel
from deployments.url_guard import UrlGuardConfig
from deployments.webhooks import WebhookConfig, WebhookSender
from jobs.job import Job, JobState
from jobs.outbox import announce, delete_endpoint, webhook_deliveries
from tests.conftest import PEPPER
from tests.database.conftest import LOOPBACK, Door, end_next_job

AnAccount = Callable[..., Account]
AJob = Callable[..., Job]
Official = Callable[..., OpenAI]


class Receiver:
    """What was sent to the endpoint, which answers with the statuses that it is given."""

    def __init__(self, server: HTTPServer) -> None:
        self.received: list[tuple[dict[str, str], str]] = []
        self.statuses: list[int] = []
        self.url = server.url_for("/hook")
        server.expect_request("/hook").respond_with_handler(self._take)

    def _take(self, request: Request) -> Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append((headers, request.get_data(as_text=True)))
        return Response(status=self.statuses.pop(0) if self.statuses else 204)


@pytest.fixture
def receiver(httpserver: HTTPServer) -> Receiver:
    return Receiver(httpserver)


@pytest.fixture
def sender(engine: Engine) -> WebhookSender:
    return WebhookSender(engine, PEPPER, WebhookConfig(guard=LOOPBACK, backoff_s=(0.0, 0.0)))


@pytest.fixture
def client(alice: Account, official: Official) -> OpenAI:
    return official()


def deliver_all(sender: WebhookSender) -> int:
    count = 0
    while (claimed := sender.claim()) is not None:
        asyncio.run(sender.deliver(claimed))
        count += 1
    return count


def end(engine: Engine, door: Door, state: JobState) -> str:
    return end_next_job(engine, door.store, state).id


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
    an_account: AnAccount, client: OpenAI, official: Official, receiver: Receiver
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
        official("bob").webhooks.delete(made.id)
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


def test_a_delivery_whose_senders_die_of_it_is_dead_in_the_end(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender,
) -> None:  # fmt: skip
    client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    a_job(alice)
    end(engine, door, JobState.SUCCEEDED)
    for _ in range(3):  # as many as its back-off allows
        assert sender.claim() is not None
        with engine.begin() as connection:
            connection.execute(update(webhook_deliveries).values(next_at_ms=0))
    assert deliver_all(sender) == 1
    assert receiver.received == []
    dead = door.as_account()("GET", "/v1/webhook_deliveries?state=dead").json()["data"]
    assert dead[0]["last_error"] == "its senders died"


def test_endpoints_beyond_the_limit_are_refused_also_at_once(door: Door, alice: Account) -> None:
    def create(index: int) -> int:
        body = {"url": f"https://example.com/{index}"}
        answer = door.as_account()("POST", "/v1/webhook_endpoints", json=body)
        return int(answer.status_code)

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(create, range(20)))
    assert (statuses.count(200), statuses.count(400)) == (16, 4)


@pytest.mark.parametrize("announced_first", [True, False])
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_endpoint_may_be_deleted_while_a_job_ends(
    engine: Engine, door: Door, alice: Account, a_job: AJob, client: OpenAI, receiver: Receiver,
    sender: WebhookSender, announced_first: bool,
) -> None:  # fmt: skip
    endpoint = client.webhooks.create(name="", url=receiver.url, event_types=["video.completed"])
    job = a_job(alice)
    acts = [
        lambda connection: announce(connection, job.id, JobState.SUCCEEDED),
        lambda connection: delete_endpoint(connection, endpoint.id, "alice"),
    ]
    first, second = acts if announced_first else reversed(acts)

    def run_second() -> None:
        with engine.begin() as connection:
            second(connection)

    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            first(connection)
            waiting = threads.submit(run_second)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        waiting.result(timeout=10)
    assert deliver_all(sender) == 0
    assert list(client.webhooks.list()) == []


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
