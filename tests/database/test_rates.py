"""Request rates: bursts, refusals that say when to come back, one count for all replicas."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, update

from credits.accounts import Account, AccountId
from credits.api_keys import add_api_key, list_api_keys
from credits.plans import Plan
from credits.rates import RateLimited, RequestRate, request_rates, take_request
from tests.conftest import PEPPER
from tests.database.conftest import Door

AnAccount = Callable[..., Account]
SLOW = RequestRate(per_s=0.01, burst=3)


@pytest.fixture(name="request_rates")
def rates_of_pro() -> dict[Plan, RequestRate]:
    return {Plan.PRO: SLOW}


def test_a_burst_is_let_through_and_the_next_is_429(door: Door, an_account: AnAccount) -> None:
    an_account("carol", plan=Plan.PRO)
    call = door.as_account("carol")
    answers = [call("GET", "/v1/credits") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert remaining == ["2", "1", "0", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"3"}
    error = answers[3].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
    assert 90 <= int(answers[3].headers["retry-after"]) <= 100
    assert 295_000 <= int(answers[3].headers["x-ratelimit-reset-requests"][:-2]) <= 300_000


def test_a_plan_without_a_limit_has_none(door: Door, alice: Account) -> None:
    answers = [door.as_account()("GET", "/v1/credits") for _ in range(9)]
    assert {answer.status_code for answer in answers} == {200}
    assert not any(name.startswith("x-ratelimit") for name in answers[0].headers)


def test_keys_count_apart_and_time_gives_back(
    engine: Engine, door: Door, an_account: AnAccount
) -> None:
    an_account("carol", plan=Plan.PRO)
    with engine.begin() as connection:
        add_api_key(connection, AccountId("carol"), "key-other", PEPPER)
        first = min(list_api_keys(connection, AccountId("carol")), key=lambda key: key.hint)
    with engine.begin() as connection:
        for _ in range(3):
            take_request(connection, first.id, SLOW)
    with pytest.raises(RateLimited), engine.begin() as connection:
        take_request(connection, first.id, SLOW)
    assert door.as_account("other")("GET", "/v1/credits").status_code == 200
    interval_us = 100_000_000
    with engine.begin() as connection:  # as if that much time had passed
        earlier = request_rates.c.whole_at_us - 2 * interval_us
        connection.execute(update(request_rates).values(whole_at_us=earlier))
    with engine.begin() as connection:
        assert take_request(connection, first.id, SLOW).remaining == 1


def test_requests_at_once_take_no_more_than_the_burst(
    engine: Engine, an_account: AnAccount
) -> None:
    an_account("carol")
    with engine.begin() as connection:
        key = list_api_keys(connection, AccountId("carol"))[0]

    def take(_: int) -> bool:
        try:
            with engine.begin() as connection:
                take_request(connection, key.id, SLOW)
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(take, range(24))) == SLOW.burst
