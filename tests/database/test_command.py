"""`mutoscope accounts` and `mutoscope keys` do what they say, as an operator types them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine

from tests.conftest import ADMIN_KEY, read_account

MUTOSCOPE = Path(sys.executable).with_name("mutoscope")
Command = Callable[..., list[str]]


@pytest.fixture
def operate(url: str, tmp_path: Path) -> Command:
    """Runs the command; its lines of output, or the one of its fault."""

    def run(*arguments: str, fails: bool = False) -> list[str]:
        done = subprocess.run(
            [str(MUTOSCOPE), *arguments],
            env={"MUTOSCOPE_URL": url, "MUTOSCOPE_ADMIN_KEY": ADMIN_KEY, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stderr
        return (done.stderr if fails else done.stdout).splitlines()

    return run


def status(url: str, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/credits", headers=headers).status_code


def test_an_account_from_its_making_to_its_end(engine: Engine, url: str, operate: Command) -> None:
    made = operate("accounts", "create", "--name", "Ann", "--plan", "pro", "--credits", "50")
    account_id, key = made[0].split()[0], made[-1]
    assert status(url, key) == 200
    operate("accounts", "create", "--name", "Bob", "--plan", "basic")
    listed = operate("accounts", "list")
    assert [line.split()[-1] for line in listed] == ["Ann", "Bob"]
    assert "50 available" in listed[0]
    assert "75 available" in operate("accounts", "grant", account_id, "25", "--reason", "gift")[0]
    assert " enterprise " in operate("accounts", "plan", account_id, "enterprise")[0]
    operate("accounts", "max-jobs", account_id, "9")
    account = read_account(engine, account_id)
    assert (account.available, account.plan, account.max_jobs) == (75, "enterprise", 9)
    assert " disabled " in operate("accounts", "disable", account_id)[0]
    assert read_account(engine, account_id).disabled
    assert " enabled " in operate("accounts", "enable", account_id)[0]


def test_keys_are_made_rotated_and_revoked(url: str, operate: Command) -> None:
    made = operate("accounts", "create", "--name", "Ann", "--plan", "pro")
    account_id, first = made[0].split()[0], made[-1]
    key_id, key = operate("keys", "create", account_id, "--name", "ci", "--expires-in-s", "600")
    rotated_id, rotated = operate("keys", "rotate", key_id)
    assert [status(url, each) for each in (first, key, rotated)] == [200, 401, 200]
    assert operate("keys", "revoke", rotated_id) == [rotated_id]
    assert status(url, rotated) == 401
    states = {line.split()[0]: line.split()[2] for line in operate("keys", "list", account_id)}
    assert sorted(states.values()) == ["good", "revoked", "revoked"]
    assert states[key_id] == states[rotated_id] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("accounts", "grant", "nobody", "5"), "No account with id 'nobody'"),
        (("accounts", "plan", "nobody", "gold"), "plan"),
        (("keys", "rotate", "nothing"), "404"),
        (("accounts", "create", "--name", "", "--plan", "pro"), "name"),
    ],
)
def test_a_refusal_is_one_line(operate: Command, arguments: tuple[str, ...], told: str) -> None:
    [line] = operate(*arguments, fails=True)
    assert line.startswith("mutoscope: ")
    assert told in line
