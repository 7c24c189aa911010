"""Who is asking: the bearer key's account, read anew at every request."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from sqlalchemy import Engine

from credits.accounts import Account
from credits.api_keys import (
    KeyId,
    Unauthenticated,
    account_of_key,
    hash_api_key,
    note_use,
)
from credits.plans import Plan
from credits.rates import Allowance, RateLimited, RequestRate, take_request
from deployments.database import single_reader
from deployments.openapi import refusals


@dataclass(frozen=True, slots=True)
class Caller:
    """An account, the key that speaks for it, and what is left of its rate, if it has one."""

    account: Account
    key_id: KeyId
    allowance: Allowance | None


# What any route with a key may answer; see deployments.errors for when.
REFUSALS = (400, 401, 402, 403, 404, 409, 413, 429, 500, 507)


class Authenticator:
    """Holds no account's key in memory: one that is revoked is refused at once by every replica."""

    def __init__(self, engine: Engine, pepper: bytes, rates: Mapping[Plan, RequestRate]) -> None:
        self.engine = engine
        self.pepper = pepper
        self.rates = rates

    def __call__(self, request: Request) -> Account:
        """The account of the bearer key, or Unauthenticated; RateLimited by its plan's rate.

        As a dependency of a router it comes before every fault of parameters.
        """
        try:
            caller = self.identify(bearer(request.headers.get("authorization", "")))
        except RateLimited as error:
            request.state.allowance = error.allowance
            raise
        request.state.caller = caller
        request.state.allowance = caller.allowance
        return caller.account

    def identify(self, api_key: str) -> Caller:
        """Who speaks with this key, which counts as one request; Unauthenticated, RateLimited."""
        key_hash = hash_api_key(api_key, self.pepper)
        with single_reader(self.engine).begin() as connection:
            account, key, is_stale = account_of_key(connection, key_hash)
        if is_stale:
            with self.engine.begin() as connection:
                note_use(connection, key.id)
        allowance = None
        if (rate := self.rates.get(account.plan)) is not None:
            with self.engine.begin() as connection:
                allowance = take_request(connection, key.id, rate)
        return Caller(account, key.id, allowance)


def caller_of(request: Request) -> Caller:
    """Whose request this is, on a route that depends on an Authenticator."""
    caller: Caller = request.state.caller
    return caller


def account_of(request: Request) -> Account:
    """Whose request this is, on a route that depends on an Authenticator."""
    return caller_of(request).account


class AdminAuthenticator:
    """Lets the one admin key through."""

    def __init__(self, admin_key: str) -> None:
        self.admin_key = admin_key.encode()

    def __call__(self, request: Request) -> None:
        """Unauthenticated for every other key."""
        given = bearer(request.headers.get("authorization", ""))
        if not hmac.compare_digest(given.encode(), self.admin_key):
            raise Unauthenticated


def keyed_router(authenticate: "Authenticator | AdminAuthenticator", prefix: str = "") -> APIRouter:
    """A router each of whose routes asks for a key first."""
    dependencies = [Depends(HTTPBearer(auto_error=False)), Depends(authenticate)]
    return APIRouter(prefix=prefix, dependencies=dependencies, responses=refusals(*REFUSALS))


def bearer(authorization: str) -> str:
    """The key of the header `Authorization: Bearer KEY`; Unauthenticated without one."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated
    return key.strip()
