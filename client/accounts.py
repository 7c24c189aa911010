"""The operator's commands: `mutoscope accounts ...` and `mutoscope keys ...`."""

import argparse
from collections.abc import Callable
from typing import Any

from client.client import Client, find_server


def add_account_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both groups; each command speaks /admin/v1 with the admin key."""
    group = commands.add_parser("accounts", help="make and change accounts (operator)")
    accounts = group.add_subparsers(required=True, metavar="ACTION")
    create = _add(accounts, "create", _create, "an account; its key is the last line, shown once")
    create.add_argument("--name", required=True)
    create.add_argument("--plan", required=True)
    create.add_argument("--credits", type=int, default=0, metavar="C")
    _add(accounts, "list", _list, "all accounts, the oldest first")
    grant = _add(accounts, "grant", _grant, "give credits")
    grant.add_argument("account")
    grant.add_argument("amount", type=int)
    grant.add_argument("--reason", default="")
    plan = _add(accounts, "plan", _change, "change the plan")
    plan.add_argument("account")
    plan.add_argument("plan")
    jobs = _add(accounts, "max-jobs", _change, "replace the plan's number of jobs at once")
    jobs.add_argument("account")
    jobs.add_argument("max_jobs", type=int)
    for name, disabled in (("disable", True), ("enable", False)):
        command = _add(accounts, name, _change, f"{name} an account")
        command.add_argument("account")
        command.set_defaults(disabled=disabled)

    group = commands.add_parser("keys", help="make and revoke API keys (operator)")
    keys = group.add_subparsers(required=True, metavar="ACTION")
    create = _add(keys, "create", _create_key, "one more key; it is the last line, shown once")
    create.add_argument("account")
    create.add_argument("--name", default="")
    create.add_argument("--expires-in-s", type=int, metavar="S")
    listed = _add(keys, "list", _list_keys, "an account's keys")
    listed.add_argument("account")
    rotate = _add(keys, "rotate", _rotate_key, "end a key and make another; it is the last line")
    rotate.add_argument("key")
    revoke = _add(keys, "revoke", _revoke_key, "end a key's validity at once")
    revoke.add_argument("key")


def _add(
    group: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    act: Callable[[Client, argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    command = group.add_parser(name, help=text)
    command.set_defaults(run=lambda arguments: _run(act, arguments))
    return command


def _run(act: Callable[[Client, argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    with Client(find_server(as_admin=True)) as client:
        act(client, arguments)


def _create(client: Client, arguments: argparse.Namespace) -> None:
    body = {name: getattr(arguments, name) for name in ("name", "plan", "credits")}
    account = client.call("POST", "/admin/v1/accounts", json=body)
    _print_account(account)
    print(account["key"])


def _list(client: Client, _arguments: argparse.Namespace) -> None:
    for account in client.pages("/admin/v1/accounts", "id"):
        _print_account(account)


def _grant(client: Client, arguments: argparse.Namespace) -> None:
    body = {"amount": arguments.amount, "reason": arguments.reason}
    path = f"/admin/v1/accounts/{arguments.account}/grants"
    _print_account(client.call("POST", path, json=body))


def _change(client: Client, arguments: argparse.Namespace) -> None:
    fields = ("plan", "max_jobs", "disabled")
    body = {name: getattr(arguments, name) for name in fields if hasattr(arguments, name)}
    _print_account(client.call("PATCH", f"/admin/v1/accounts/{arguments.account}", json=body))


def _create_key(client: Client, arguments: argparse.Namespace) -> None:
    body: dict[str, Any] = {"name": arguments.name}
    if arguments.expires_in_s is not None:
        body["expires_in_s"] = arguments.expires_in_s
    _print_key(client.call("POST", f"/admin/v1/accounts/{arguments.account}/keys", json=body))


def _rotate_key(client: Client, arguments: argparse.Namespace) -> None:
    _print_key(client.call("POST", f"/admin/v1/keys/{arguments.key}/rotate"))


def _print_key(key: dict[str, Any]) -> None:
    print(key["id"])
    print(key["key"])


def _list_keys(client: Client, arguments: argparse.Namespace) -> None:
    page = client.call("GET", f"/admin/v1/accounts/{arguments.account}/keys")
    for key in page["data"]:
        state = "revoked" if key["revoked_at"] is not None else "good"
        print(f"{key['id']}  {key['hint']}...  {state:8}{key['name']}")


def _revoke_key(client: Client, arguments: argparse.Namespace) -> None:
    print(client.call("DELETE", f"/admin/v1/keys/{arguments.key}")["id"])


def _print_account(account: dict[str, Any]) -> None:
    state = "disabled" if account["disabled"] else "enabled"
    print(
        f"{account['id']}  {account['plan']:11}{state:10}{account['available']:>12} available"
        f"{account['reserved']:>10} reserved{account['spent']:>12} spent  {account['name']}"
    )
