"""The routes by which an account looks after its own API keys."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from sqlalchemy import Connection, Engine

from credits.accounts import AccountId
from credits.api_keys import add_api_key, list_api_keys, new_api_key, revoke_api_key
from credits.audit import note
from deployments.authentication import Authenticator, account_of, keyed_router
from deployments.database import reader
from deployments.wire import key_json
from deployments.wire_bodies import KeyBody


class KeyRoutes:
    """A key is shown once, in the answer that makes it."""

    def __init__(self, engine: Engine, pepper: bytes, authenticate: Authenticator) -> None:
        self.engine = engine
        self.pepper = pepper
        self.authenticate = authenticate

    def router(self) -> APIRouter:
        """All routes; each needs an API key."""
        router = keyed_router(self.authenticate)
        router.add_api_route("/v1/keys", self.create_key, methods=["POST"])
        router.add_api_route("/v1/keys", self.list_keys, methods=["GET"])
        router.add_api_route("/v1/keys/{key_id}/rotate", self.rotate_key, methods=["POST"])
        router.add_api_route("/v1/keys/{key_id}", self.revoke_key, methods=["DELETE"])
        return router

    def create_key(
        self, request: Request, body: Annotated[KeyBody | None, Body()] = None
    ) -> dict[str, Any]:
        """One more key for the account."""
        account = account_of(request)
        with self.engine.begin() as connection:
            return issue_key(connection, account.id, self.pepper, body or KeyBody(), account.id)

    def list_keys(self, request: Request) -> dict[str, Any]:
        """The account's keys, those that are no longer good included."""
        account = account_of(request)
        with reader(self.engine).begin() as connection:
            keys = list_api_keys(connection, account.id)
        return {"object": "list", "data": [key_json(key) for key in keys]}

    def rotate_key(self, request: Request, key_id: str) -> dict[str, Any]:
        """A new key in place of this one, which ends at once; it is valid as long as that was."""
        account = account_of(request)
        with self.engine.begin() as connection:
            return replace_key(connection, key_id, self.pepper, account.id, account.id)

    def revoke_key(self, request: Request, key_id: str) -> dict[str, Any]:
        """End a key's validity at once, on every replica."""
        account = account_of(request)
        with self.engine.begin() as connection:
            key = revoke_api_key(connection, key_id, account.id)
            note(connection, account.id, "key.revoke", account.id, key=key.id)
        return key_json(key)


def replace_key(
    connection: Connection,
    key_id: str,
    pepper: bytes,
    actor: str,
    account_id: AccountId | None = None,
) -> dict[str, Any]:
    """End a good key and make another, valid as long as it; KeyNotFound, as for another account's.

    account_id None: whosever it is.
    """
    old = revoke_api_key(connection, key_id, account_id, only_good=True)
    note(connection, actor, "key.revoke", old.account_id, key=old.id)
    body = KeyBody(name=old.name)
    return issue_key(connection, old.account_id, pepper, body, actor, old.expires_at_ms)


def issue_key(
    connection: Connection,
    account_id: AccountId,
    pepper: bytes,
    body: KeyBody,
    actor: str,
    expires_at_ms: int | None = None,
) -> dict[str, Any]:
    """Make a key and answer with it, the only time that it is shown."""
    secret = new_api_key()
    key = add_api_key(
        connection,
        account_id,
        secret,
        pepper,
        name=body.name,
        valid_s=body.expires_in_s,
        expires_at_ms=expires_at_ms,
    )
    note(connection, actor, "key.create", account_id, key=key.id, name=key.name)
    return {**key_json(key), "key": secret}
