"""What an account sees of its credits: balance, statement, CSV."""

import csv
from collections.abc import Callable
from typing import Any

import pytest

from credits.accounts import Account
from tests.database.conftest import Door

AnAccount = Callable[..., Account]


def create_and_cancel(door: Door, count: int) -> list[str]:
    """Videos that cost nothing in the end; their ids."""
    call = door.as_account()
    ids = [call("POST", "/v1/videos", json={"prompt": "x"}).json()["id"] for _ in range(count)]
    for video_id in ids:
        call("DELETE", f"/v1/videos/{video_id}")
    return ids


def entries(door: Door, query: str = "", account_id: str = "alice") -> dict[str, Any]:
    page: dict[str, Any] = door.as_account(account_id)("GET", f"/v1/credits/entries{query}").json()
    return page


def test_the_statement_names_every_transfer_and_its_video(
    door: Door, alice: Account, an_account: AnAccount
) -> None:
    an_account("bob")
    (video_id,) = create_and_cancel(door, 1)
    page = entries(door, "?order=asc")
    assert [(entry["kind"], entry["amount"]) for entry in page["data"]] == [
        ("grant", 1000),
        ("reserve", 26),
        ("refund", 26),
    ]
    assert [entry["video_id"] for entry in page["data"]] == [None, video_id, video_id]
    assert page["data"][1]["debit"] == page["data"][2]["credit"] == "alice:available"
    assert not page["has_more"]
    assert [entry["kind"] for entry in entries(door, "", "bob")["data"]] == ["grant"]


def test_the_statement_is_read_in_pages(door: Door, alice: Account) -> None:
    create_and_cancel(door, 2)
    first = entries(door, "?limit=2")
    assert first["has_more"]
    create_and_cancel(door, 1)
    rest = entries(door, f"?limit=100&after={first['data'][-1]['number']}")
    kinds = [entry["kind"] for entry in first["data"] + rest["data"]]
    assert kinds == ["refund", "refund", "reserve", "reserve", "grant"]
    assert not rest["has_more"]


def test_the_csv_holds_the_whole_statement(
    door: Door, alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.credit_routes.CSV_PAGE", 2)
    create_and_cancel(door, 3)
    answer = door.as_account()("GET", "/v1/credits/entries.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(answer.text.splitlines()))
    listed = entries(door, "?order=asc&limit=100")["data"]
    assert [row["number"] for row in rows] == [str(entry["number"]) for entry in listed]
    assert {row["created_at"][:2] for row in rows} == {"20"}
    assert sum(int(row["amount"]) for row in rows if row["kind"] == "refund") == 3 * 26


@pytest.mark.parametrize("query", ["?after=x", "?after=-1", "?limit=0", "?order=up"])
def test_a_wrong_parameter_is_named(door: Door, alice: Account, query: str) -> None:
    answer = door.as_account()("GET", f"/v1/credits/entries{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query[1:].partition("=")[0]
