"""Accounts and keys: what the operator and the owner may do, and what it does at once."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from credits.accounts import Account
from credits.api_keys import Unauthenticated, account_of_key, hash_api_key, revoke_api_key
from credits.ledger import ReservationId, settle
from credits.pricing import Credits
from deployments.config import LocalAccountConfig
from deployments.database import reader
from deployments.local_account import ensure_local_account
from jobs.job import JobState, Outcome
from jobs.store import finish
from tests.conftest import ADMIN_KEY, PEPPER, read_account
from tests.database.conftest import Caller, Door, job_now, lease_now

AJob = Callable[..., Any]
AnAccount = Callable[..., Account]


@pytest.fixture
def admin(door: Door) -> Caller:
    return Caller(door.client, {"authorization": f"Bearer {ADMIN_KEY}"})


def with_key(door: Door, key: str) -> Caller:
    return Caller(door.client, {"authorization": f"Bearer {key}"})


def audit(admin: Caller, account_id: str) -> list[str]:
    page = admin("GET", f"/admin/v1/audit?order=asc&account_id={account_id}").json()
    return [entry["action"] for entry in page["data"]]


def test_an_account_is_made_with_credits_and_a_key_that_is_shown_once(
    door: Door, admin: Caller
) -> None:
    body = {"name": "Alice Ltd", "plan": "pro", "credits": 500}
    account = admin("POST", "/admin/v1/accounts", json=body).json()
    key = account.pop("key")
    assert with_key(door, key)("GET", "/v1/credits").json() == {
        "plan": "pro",
        "available": 500,
        "reserved": 0,
        "spent": 0,
    }
    path = f"/admin/v1/accounts/{account['id']}"
    assert admin("GET", path).json() == account
    listed = admin("GET", f"{path}/keys").text + admin("GET", "/admin/v1/accounts").text
    assert key not in listed
    assert account["id"] in listed
    assert audit(admin, account["id"]) == ["account.create", "key.create"]


def test_grants_plans_and_limits_take_effect_at_once(
    door: Door, admin: Caller, an_account: AnAccount
) -> None:
    an_account("alice", credits=0)
    create = {"json": {"prompt": "x"}}
    call = door.as_account()
    assert call("POST", "/v1/videos", **create).status_code == 402
    granted = admin("POST", "/admin/v1/accounts/alice/grants", json={"amount": 100}).json()
    assert granted["available"] == 100
    changed = admin("PATCH", "/admin/v1/accounts/alice", json={"max_jobs": 1}).json()
    assert changed["max_jobs"] == 1
    assert call("POST", "/v1/videos", **create).status_code == 200
    assert call("POST", "/v1/videos", **create).status_code == 429
    admin("PATCH", "/admin/v1/accounts/alice", json={"plan": "basic"})
    assert call("POST", "/v1/videos", **create).status_code == 403
    assert audit(admin, "alice") == ["credits.grant", "account.change", "account.change"]


def test_disabling_ends_what_is_queued_and_asks_what_runs(
    engine: Engine, door: Door, admin: Caller, alice: Account, a_job: AJob
) -> None:
    running, queued = a_job(alice), a_job(alice)
    lease_now(engine)
    door.wakes.clear()
    changed = admin("PATCH", "/admin/v1/accounts/alice", json={"disabled": True}).json()
    assert changed["disabled"]
    assert job_now(engine, queued).state is JobState.CANCELLED
    assert job_now(engine, running).cancel_requested
    assert door.wakes
    refused = door.as_account()("POST", "/v1/videos", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "account_disabled")
    assert door.as_account()("GET", f"/v1/videos/{queued.id}").status_code == 200
    account = read_account(engine, "alice")
    assert (account.open_reservations, account.reserved) == (1, running.quoted)
    admin("PATCH", "/admin/v1/accounts/alice", json={"disabled": False})
    assert door.as_account()("POST", "/v1/videos", json={"prompt": "x"}).status_code == 200


def test_a_kill_right_after_disabling_leaves_no_job_that_runs_on(
    engine: Engine, door: Door, admin: Caller, alice: Account, a_job: AJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    running, queued = a_job(alice), a_job(alice)
    lease_now(engine)

    def die(*_: Any) -> None:
        raise SystemError("killed")

    monkeypatch.setattr("deployments.admin_routes.AdminRoutes._end_queued", die)
    assert admin("PATCH", "/admin/v1/accounts/alice", json={"disabled": True}).status_code == 500
    assert read_account(engine, "alice").disabled
    assert job_now(engine, running).cancel_requested
    assert job_now(engine, queued).cancel_requested


def test_disabling_waits_for_a_job_that_is_being_settled_and_not_it_for_disabling(
    engine: Engine, admin: Caller, alice: Account, a_job: AJob
) -> None:
    """Both lock the job first and the account last: else each would wait for the other."""
    a_job(alice)
    job = lease_now(engine)
    assert job is not None
    answers: list[Any] = []
    change = {"json": {"disabled": True, "plan": "pro"}}
    operator = threading.Thread(
        target=lambda: answers.append(admin("PATCH", "/admin/v1/accounts/alice", **change))
    )
    outcome = Outcome(JobState.FAILED, charged=0, refunded=job.quoted, reason="fault")
    with engine.begin() as connection:
        finish(connection, job.id, lease_owner="me", outcome=outcome)
        operator.start()
        if engine.dialect.name == "postgresql":
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            with reader(engine).connect() as observer:
                deadline_s = time.monotonic() + 20
                while not observer.execute(waiting).scalar_one():
                    assert time.monotonic() < deadline_s
                    observer.rollback()
        settle(connection, ReservationId(job.reservation_id), Credits(0))
    operator.join()
    assert answers[0].status_code == 200
    account = read_account(engine, "alice")
    assert (account.disabled, account.reserved, account.available) == (True, 0, 1000)


def test_an_owner_makes_rotates_and_revokes_keys(door: Door, admin: Caller, alice: Account) -> None:
    call = door.as_account()
    made = call("POST", "/v1/keys", json={"name": "ci"}).json()
    ci = with_key(door, made["key"])
    assert ci("GET", "/v1/credits").status_code == 200
    rotated = ci("POST", f"/v1/keys/{made['id']}/rotate").json()
    assert ci("GET", "/v1/credits").status_code == 401
    fresh = with_key(door, rotated["key"])
    keys = fresh("GET", "/v1/keys").json()["data"]
    assert [key["name"] for key in keys].count("ci") == 2
    assert made["key"] not in str(keys)
    used = {key["id"]: key["last_used_at"] for key in keys}
    assert used[rotated["id"]] is not None
    assert fresh("DELETE", f"/v1/keys/{rotated['id']}").json()["revoked_at"] is not None
    assert fresh("GET", "/v1/credits").status_code == 401
    assert audit(admin, "alice") == [
        "key.create", "key.revoke", "key.create", "key.revoke",
    ]  # fmt: skip


def test_a_rotated_key_ends_when_the_first_one_would_have(door: Door, alice: Account) -> None:
    call = door.as_account()
    made = call("POST", "/v1/keys", json={"expires_in_s": 3600}).json()
    rotated = call("POST", f"/v1/keys/{made['id']}/rotate").json()
    assert rotated["expires_at"] == made["expires_at"] is not None
    assert call("POST", f"/v1/keys/{made['id']}/rotate").status_code == 404


def test_a_revoked_local_key_stays_revoked_and_the_server_starts(
    engine: Engine, tmp_path: Path
) -> None:
    for _ in range(2):
        ensure_local_account(engine, LocalAccountConfig(), tmp_path, PEPPER)
    key = (tmp_path / "api_key").read_text()
    with engine.begin() as connection:
        _, found, _ = account_of_key(connection, hash_api_key(key, PEPPER))
        revoke_api_key(connection, found.id)
    ensure_local_account(engine, LocalAccountConfig(), tmp_path, PEPPER)
    with engine.begin() as connection, pytest.raises(Unauthenticated):
        account_of_key(connection, hash_api_key(key, PEPPER))


def test_a_limit_is_replaced_and_given_back_to_the_plan(
    engine: Engine, admin: Caller, alice: Account
) -> None:
    for body, limit in (({"max_jobs": 9}, 9), ({"plan": "pro"}, 9), ({"max_jobs": None}, None)):
        assert admin("PATCH", "/admin/v1/accounts/alice", json=body).json()["max_jobs"] == limit
    assert read_account(engine, "alice").plan == "pro"
    for body in ({"plan": None}, {"disabled": None}):
        assert admin("PATCH", "/admin/v1/accounts/alice", json=body).status_code == 400


def test_a_key_ends_when_its_time_is_over(engine: Engine, door: Door, alice: Account) -> None:
    made = door.as_account()("POST", "/v1/keys", json={"expires_in_s": 3600}).json()
    assert with_key(door, made["key"])("GET", "/v1/credits").status_code == 200
    with engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET expires_at_ms = 1 WHERE hint <> 'key-alice'"))
    assert with_key(door, made["key"])("GET", "/v1/credits").status_code == 401


def test_another_accounts_key_is_404(door: Door, alice: Account, an_account: AnAccount) -> None:
    an_account("bob")
    made = door.as_account("bob")("POST", "/v1/keys").json()
    for method, path in (("DELETE", ""), ("POST", "/rotate")):
        assert door.as_account()(method, f"/v1/keys/{made['id']}{path}").status_code == 404
    assert with_key(door, made["key"])("GET", "/v1/credits").status_code == 200


ADMIN_CALLS = [
    ("GET", "/admin/v1/accounts"),
    ("POST", "/admin/v1/accounts"),
    ("GET", "/admin/v1/accounts/alice"),
    ("PATCH", "/admin/v1/accounts/alice"),
    ("POST", "/admin/v1/accounts/alice/grants"),
    ("POST", "/admin/v1/accounts/alice/keys"),
    ("GET", "/admin/v1/accounts/alice/keys"),
    ("GET", "/admin/v1/accounts/alice/jobs"),
    ("DELETE", "/admin/v1/keys/x"),
    ("GET", "/admin/v1/audit"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN_CALLS)
def test_the_operators_routes_take_no_accounts_key(
    door: Door, alice: Account, method: str, path: str
) -> None:
    assert door.as_account()(method, path).status_code == 401
    assert door.client.request(method, path).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/admin/v1/accounts", {"name": "x", "plan": "gold"}, 400, "plan"),
        ("POST", "/admin/v1/accounts", {"name": "", "plan": "pro"}, 400, "name"),
        ("POST", "/admin/v1/accounts", {"name": "x", "plan": "pro", "credits": -1}, 400, "credits"),
        ("POST", "/admin/v1/accounts", {"name": "x", "plan": "pro", "colour": 1}, 400, "colour"),
        ("POST", "/admin/v1/accounts/alice/grants", {"amount": 0}, 400, "amount"),
        ("POST", "/admin/v1/accounts/alice/grants", {"amount": 10**13}, 400, "amount"),
        ("POST", "/admin/v1/accounts/nobody/grants", {"amount": 1}, 404, None),
        ("PATCH", "/admin/v1/accounts/nobody", {"plan": "pro"}, 404, None),
        ("GET", "/admin/v1/accounts/nobody", None, 404, None),
        ("DELETE", "/admin/v1/keys/nothing", None, 404, None),
        ("GET", "/admin/v1/audit?after=x", None, 400, "after"),
        ("POST", "/admin/v1/accounts", {"name": "a\x00", "plan": "pro"}, 400, "name"),
    ],
)
def test_a_wrong_call_is_refused_by_name(
    engine: Engine, admin: Caller, alice: Account, method: str, path: str, body: Any, status: int,
    param: str | None,
) -> None:  # fmt: skip
    answer = admin(method, path, **({} if body is None else {"json": body}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert read_account(engine, "alice") == alice


def test_the_audit_log_is_append_only(engine: Engine, admin: Caller, alice: Account) -> None:
    admin("POST", "/admin/v1/accounts/alice/grants", json={"amount": 5, "reason": "gift"})
    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.execute(text("UPDATE audit_log SET actor = 'nobody'"))
    (entry,) = admin("GET", "/admin/v1/audit?account_id=alice").json()["data"]
    assert (entry["actor"], entry["details"]) == ("admin", {"amount": 5, "reason": "gift"})
