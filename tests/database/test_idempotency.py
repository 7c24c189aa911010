"""The same request sent twice is one job and one charge."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from sqlalchemy import Engine, select, update
from werkzeug.wrappers import Response

from credits.accounts import Account
from credits.ledger import grant
from credits.pricing import Credits
from deployments.idempotency import Attempt
from jobs.tables import jobs
from models.request import VideoRequest
from tests.conftest import read_account
from tests.database.conftest import Door, png

AnAccount = Callable[..., Account]
BODY = {"prompt": "a red circle", "num_frames": 13}


def create(
    door: Door, body: dict[str, Any] = BODY, account_id: str = "alice", **headers: str
) -> Any:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return door.as_account(account_id)("POST", "/v1/videos", json=body, headers=sent)


def test_a_key_used_again_answers_with_the_first_job(
    engine: Engine, door: Door, alice: Account
) -> None:
    first = create(door, idempotency_key="k").json()
    again = create(door, idempotency_key="k")
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    assert create(door, idempotency_key="other").json()["id"] != first["id"]
    assert read_account(engine, "alice").reserved == 2 * 26


def test_a_key_with_other_fields_is_409_and_not_retried(
    engine: Engine, door: Door, alice: Account
) -> None:
    create(door, idempotency_key="k")
    for body in ({**BODY, "seed": 1}, {**BODY, "input_reference": None, "fps": 9}):
        refused = create(door, body, idempotency_key="k")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "idempotency_conflict"
        assert refused.headers["x-should-retry"] == "false"
    assert read_account(engine, "alice").reserved == 26


def test_a_start_image_is_one_of_the_fields(door: Door, alice: Account) -> None:
    call = door.as_account()

    def send(side: int) -> Any:
        files = {"input_reference": ("x.png", png(side, side))}
        headers = {"idempotency-key": "k"}
        return call("POST", "/v1/videos", data={"prompt": "x"}, files=files, headers=headers)

    first = send(20)
    assert send(20).json()["id"] == first.json()["id"]
    assert send(30).status_code == 409
    assert len(list(door.store.list("inputs/"))) == 1


def test_keys_are_an_accounts_own(door: Door, alice: Account, an_account: AnAccount) -> None:
    an_account("bob")
    first = create(door, idempotency_key="k").json()
    assert create(door, account_id="bob", idempotency_key="k").json()["id"] != first["id"]


def test_a_refused_attempt_leaves_its_key_free(
    engine: Engine, door: Door, an_account: AnAccount
) -> None:
    alice = an_account("alice", credits=0)
    assert create(door, idempotency_key="k").status_code == 402
    with engine.begin() as connection:
        grant(connection, alice.id, Credits(100))
    assert create(door, idempotency_key="k").status_code == 200


def test_a_refusal_is_not_answered_with_an_older_job_of_the_same_fields(
    engine: Engine, door: Door, alice: Account
) -> None:
    for _ in range(4):
        create(door, x_stainless_retry_count="0")
    refused = create(door, x_stainless_retry_count="0")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")


def test_a_retry_never_finds_a_job_that_failed(engine: Engine, door: Door, alice: Account) -> None:
    first = create(door, x_stainless_retry_count="0").json()
    door.as_account()("DELETE", f"/v1/videos/{first['id']}")
    assert create(door, x_stainless_retry_count="1").json()["id"] != first["id"]


def test_a_retry_that_overtakes_its_first_attempt_makes_one_job(
    engine: Engine, door: Door, alice: Account
) -> None:
    answers: list[Any] = []

    def send(count: int) -> None:
        answers.append(create(door, x_stainless_retry_count=str(count)))

    threads = [threading.Thread(target=send, args=(count,)) for count in (1, 1, 2, 1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert read_account(engine, "alice").open_reservations == 1


@pytest.fixture
def images() -> Iterator[HTTPServer]:
    """One that answers while another request is held up."""
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("cancelled", [False, True])
def test_an_attempt_that_its_own_retry_has_overtaken_is_answered_with_that_job(
    engine: Engine,
    door: Door,
    alice: Account,
    images: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    cancelled: bool,
    count: int,
) -> None:
    """The first is held up by the server of its image; its client gives up, and sends it again."""
    # the retry comes sooner here than the official client's
    monkeypatch.setattr("deployments.idempotency.OVERTAKEN_AFTER_S", 0.0)
    asked, go_on = threading.Event(), threading.Event()

    def serve(_request: Any) -> Response:
        if not asked.is_set():
            asked.set()
            assert go_on.wait(30)
        return Response(png(32, 32), content_type="image/png")

    images.expect_request("/x.png").respond_with_handler(serve)
    body = {**BODY, "input_reference": images.url_for("/x.png")}
    answers: list[Any] = []
    late = threading.Thread(
        target=lambda: answers.append(create(door, body, x_stainless_retry_count=str(count)))
    )
    late.start()
    assert asked.wait(30)
    other = create(door, body, x_stainless_retry_count="0").json()  # asked for on purpose
    retried = create(door, body, x_stainless_retry_count="1").json()
    assert retried["id"] == other["id"]
    with engine.begin() as connection:  # as if there were no other: then the retry makes one
        connection.execute(update(jobs).values(fields_hash="other"))
    retried = create(door, body, x_stainless_retry_count=str(count + 1)).json()
    assert retried["id"] != other["id"]
    if cancelled:
        door.as_account()("DELETE", f"/v1/videos/{retried['id']}")
    go_on.set()
    late.join()
    assert answers[0].json()["id"] == retried["id"]
    assert read_account(engine, "alice").open_reservations == 2 - cancelled
    held = {other["id"]} if cancelled else {other["id"], retried["id"]}
    assert {info.key for info in door.store.list("inputs/")} == {f"inputs/{name}" for name in held}


def test_a_later_request_is_not_answered_with_the_job_of_an_earlier_ones_retry(
    engine: Engine, door: Door, alice: Account, a_request: Callable[..., VideoRequest]
) -> None:
    retried = create(door, x_stainless_retry_count="1").json()
    with engine.begin() as connection:
        connection.execute(update(jobs).values(created_at_ms=jobs.c.created_at_ms - 2000))
        fields_hash = connection.execute(select(jobs.c.fields_hash)).scalar_one()
    late = Attempt(fields_hash, arrived_s=time.monotonic() - 1.0)
    assert late.may_be_overtaken
    assert door.admission.admit(alice, a_request(), attempt=late).id != retried["id"]
    early = Attempt(fields_hash, arrived_s=time.monotonic() - 3.0)
    assert door.admission.admit(alice, a_request(), attempt=early).id == retried["id"]


def test_fifty_threads_with_one_key_make_one_job(
    engine: Engine, door: Door, alice: Account
) -> None:
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(create(door, idempotency_key="k")))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    account = read_account(engine, "alice")
    assert (account.reserved, account.open_reservations) == (26, 1)


def test_the_official_clients_own_retry_finds_its_first_job(
    engine: Engine, door: Door, alice: Account
) -> None:
    first = create(door, x_stainless_retry_count="0").json()
    retried = create(door, x_stainless_retry_count="1").json()
    assert retried["id"] == first["id"]
    other = create(door, {**BODY, "prompt": "another"}, x_stainless_retry_count="1").json()
    assert other["id"] != first["id"]
    anew = create(door, x_stainless_retry_count="0").json()
    assert anew["id"] not in (first["id"], other["id"])
    assert read_account(engine, "alice").open_reservations == 3


@pytest.mark.parametrize("seconds", [601, 1201, 1802])
def test_a_retry_after_the_official_clients_own_time_outs_finds_its_first_job(
    engine: Engine, door: Door, alice: Account, seconds: int
) -> None:
    first = create(door, x_stainless_retry_count="0").json()
    earlier = jobs.c.created_at_ms - 1000 * seconds
    with engine.begin() as connection:
        connection.execute(update(jobs).values(created_at_ms=earlier))
    assert create(door, x_stainless_retry_count="1").json()["id"] == first["id"]


def test_a_retry_long_after_is_a_new_request(engine: Engine, door: Door, alice: Account) -> None:
    first = create(door, x_stainless_retry_count="0").json()
    with engine.begin() as connection:
        connection.execute(update(jobs).values(created_at_ms=jobs.c.created_at_ms - 3_600_000))
    assert create(door, x_stainless_retry_count="1").json()["id"] != first["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x7fb"])
def test_what_is_no_key_is_refused(engine: Engine, door: Door, alice: Account, key: str) -> None:
    refused = create(door, idempotency_key=key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert read_account(engine, "alice").reserved == 0
