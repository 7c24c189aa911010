"""Two ingress replicas over one database: as one to the official client, and to attackers."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import ConflictError, NotFoundError, OpenAI
from sqlalchemy import Engine, func, select

from bench.clusters import no_pools
from credits.accounts import Account, AccountId, change_account
from credits.plans import Plan
from deployments.ingress import IngressParts, create_app
from jobs.tables import jobs
from tests.conftest import read_account
from tests.database.conftest import end_next_job, served

AnAccount = Callable[..., Account]
BODY = {"prompt": "x", "num_frames": 13, "seed": 1}
PRICE = 26


@pytest.fixture
def replicas(engine: Engine, parts: IngressParts) -> Iterator[list[str]]:
    with (
        served(create_app(parts, lambda: None, no_pools)) as one,
        served(create_app(parts, lambda: None, no_pools)) as other,
    ):
        yield [one, other]


def post_all(replicas: list[str], count: int, headers: Callable[[int], Any]) -> list[Any]:
    """POSTs at once from many threads, to one replica and the other."""
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(16) as threads:

        def post(index: int) -> httpx.Response:
            key = {"authorization": "Bearer key-alice"}
            return client.post(
                f"{replicas[index % 2]}/v1/videos", json=BODY, headers={**key, **headers(index)}
            )

        return list(threads.map(post, range(count)))


def let_have(engine: Engine, max_jobs: int) -> None:
    with engine.begin() as connection:
        change_account(connection, "alice", {"max_jobs": max_jobs})


def count_jobs(engine: Engine) -> int:
    with engine.begin() as connection:
        return connection.execute(select(func.count()).select_from(jobs)).scalar_one()


def test_the_official_client_goes_from_one_to_the_other(
    engine: Engine, replicas: list[str], parts: IngressParts, an_account: AnAccount,
    official: Callable[..., OpenAI],
) -> None:  # fmt: skip
    an_account()
    first, second = (official(at=url) for url in replicas)
    video = first.videos.create(prompt="x", size="64x64", seconds="2")  # type: ignore[arg-type]
    assert second.videos.retrieve(video.id).status == "queued"
    with pytest.raises(ConflictError):
        second.videos.download_content(video.id)
    end_next_job(engine, parts.store, content=b"video")
    assert second.videos.poll(video.id).status == "completed"
    assert second.videos.download_content(video.id).read() == b"video"
    other = second.videos.create(prompt="y")
    assert [found.id for found in first.videos.list(limit=1)] == [other.id, video.id]
    assert first.videos.delete(other.id).deleted
    assert second.videos.retrieve(other.id).error.code == "cancelled"  # type: ignore[union-attr]
    assert second.videos.delete(video.id).deleted
    with pytest.raises(NotFoundError):
        first.videos.retrieve(video.id)


def test_of_two_hundred_creates_as_many_pass_as_there_are_credits_for(
    engine: Engine, replicas: list[str], an_account: AnAccount
) -> None:
    an_account(credits=7 * PRICE + PRICE - 1)
    let_have(engine, 1000)
    answers = post_all(replicas, 200, lambda _: {})
    assert Counter(answer.status_code for answer in answers) == {200: 7, 402: 193}
    account = read_account(engine, "alice")
    assert (account.available, account.reserved) == (PRICE - 1, 7 * PRICE)
    assert count_jobs(engine) == 7


def test_of_two_hundred_creates_as_many_pass_as_may_run_at_once(
    engine: Engine, replicas: list[str], an_account: AnAccount
) -> None:
    an_account(credits=10**6)
    let_have(engine, 4)
    answers = post_all(replicas, 200, lambda _: {})
    assert Counter(answer.status_code for answer in answers) == {200: 4, 429: 196}
    assert count_jobs(engine) == 4


def test_one_key_from_fifty_threads_makes_one_job(
    engine: Engine, replicas: list[str], an_account: AnAccount
) -> None:
    an_account(plan=Plan.ENTERPRISE, credits=10**6)
    let_have(engine, 1000)
    answers = post_all(replicas, 50, lambda _: {"idempotency-key": "k"})
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (count_jobs(engine), read_account(engine, "alice").reserved) == (1, PRICE)


def test_a_retry_from_fifty_threads_makes_one_job(
    engine: Engine, replicas: list[str], an_account: AnAccount
) -> None:
    an_account(credits=10**6)
    let_have(engine, 1000)
    answers = post_all(replicas, 50, lambda index: {"x-stainless-retry-count": str(index + 1)})
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (count_jobs(engine), read_account(engine, "alice").reserved) == (1, PRICE)


def test_a_key_that_is_revoked_on_one_is_refused_by_the_other_at_once(
    engine: Engine, replicas: list[str], an_account: AnAccount
) -> None:
    an_account()
    headers = {"authorization": "Bearer key-alice"}
    with httpx.Client(headers=headers) as client:
        (key,) = client.get(f"{replicas[0]}/v1/keys").json()["data"]
        assert client.delete(f"{replicas[0]}/v1/keys/{key['id']}").status_code == 200
        assert client.get(f"{replicas[1]}/v1/credits").status_code == 401
    assert read_account(engine, AccountId("alice")).available == 1000
