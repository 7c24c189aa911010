"""The operator's routes under /admin/v1: accounts, plans, credits, keys, jobs, audit log, pools."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query
from sqlalchemy import Connection, Engine

from credits.accounts import (
    Account,
    AccountId,
    change_account,
    create_account,
    get_account,
    list_accounts,
    new_account_id,
)
from credits.api_keys import list_api_keys, revoke_api_key
from credits.audit import list_audit, note
from credits.ledger import grant
from credits.plans import Plan, PlanTable
from credits.pricing import Credits, WorkWeights
from deployments.authentication import AdminAuthenticator, keyed_router
from deployments.create_routes import Waker
from deployments.database import reader
from deployments.key_routes import issue_key, replace_key
from deployments.paging import Page
from deployments.settlement import cancel
from deployments.wire import account_json, audit_json, job_json, key_json
from deployments.wire_bodies import AccountBody, AccountChange, GrantBody, KeyBody
from jobs.retention import keep_for
from jobs.store import list_jobs, open_jobs, request_cancel_of_all
from media.object_store import ObjectStore

ADMIN = "admin"
ExplainScaling = Callable[[], Awaitable[list[dict[str, Any]]]]
Number = Annotated[int | None, Query(ge=0, le=2**31 - 1)]


class AdminRoutes:
    """Every change is in the audit log, in the transaction that makes it."""

    def __init__(
        self,
        engine: Engine,
        store: ObjectStore,
        pepper: bytes,
        plans: PlanTable,
        weights: WorkWeights,
        authenticate: AdminAuthenticator,
        wake: Waker,
        explain_scaling: ExplainScaling,
    ) -> None:
        self.engine = engine
        self.store = store
        self.pepper = pepper
        self.plans = plans
        self.weights = weights
        self.authenticate = authenticate
        self.wake = wake
        self.explain_scaling = explain_scaling

    def router(self) -> APIRouter:
        """All routes; each needs the admin key."""
        router = keyed_router(self.authenticate, prefix="/admin/v1")
        add = router.add_api_route
        add("/accounts", self.create_account, methods=["POST"])
        add("/accounts", self.list_accounts, methods=["GET"])
        add("/accounts/{account_id}", self.get_account, methods=["GET"])
        add("/accounts/{account_id}", self.change_account, methods=["PATCH"])
        add("/accounts/{account_id}/grants", self.grant, methods=["POST"])
        add("/accounts/{account_id}/keys", self.create_key, methods=["POST"])
        add("/accounts/{account_id}/keys", self.list_keys, methods=["GET"])
        add("/accounts/{account_id}/jobs", self.list_jobs, methods=["GET"])
        add("/keys/{key_id}", self.revoke_key, methods=["DELETE"])
        add("/keys/{key_id}/rotate", self.rotate_key, methods=["POST"])
        add("/audit", self.list_audit, methods=["GET"])
        add("/autoscaling", self.autoscaling, methods=["GET"])
        return router

    def create_account(self, body: AccountBody) -> dict[str, Any]:
        """An account with its first credits; its first key is shown here and never again."""
        account_id = new_account_id()
        with self.engine.begin() as connection:
            create_account(connection, account_id, body.name, body.plan)
            note(connection, ADMIN, "account.create", account_id, **body.model_dump(mode="json"))
            if body.credits:
                grant(connection, account_id, Credits(body.credits))
            key = issue_key(connection, account_id, self.pepper, KeyBody(name="first"), ADMIN)
            account = get_account(connection, account_id)
        return {**account_json(account), "key": key["key"]}

    def list_accounts(
        self, page: Annotated[Page, Depends()], after: str | None = None
    ) -> dict[str, Any]:
        """A page of all accounts."""
        with reader(self.engine).begin() as connection:
            found = list_accounts(
                connection, after=after, limit=page.limit + 1, ascending=page.ascending
            )
        return page.json([account_json(account) for account in found])

    def get_account(self, account_id: str) -> dict[str, Any]:
        """An account as it stands."""
        with reader(self.engine).begin() as connection:
            return account_json(get_account(connection, account_id))

    def change_account(self, account_id: str, body: AccountChange) -> dict[str, Any]:
        """Change plan or concurrency; disabling also ends whatever the account has queued or
        running, and settles it. With another plan, videos are kept as that says, from now on.
        """
        change = body.model_dump(mode="json", exclude_unset=True)
        with self.engine.begin() as connection:
            before = get_account(connection, account_id)
            # Jobs are locked before their account, as whoever settles one does.
            self._change_jobs(connection, before, change)
            account = change_account(connection, account_id, change)
            note(connection, ADMIN, "account.change", account.id, **change)
            self._change_jobs(connection, before, change)  # those admitted in between, too
        if account.disabled:
            self._end_queued(account.id)
        return account_json(account)

    def _change_jobs(
        self, connection: Connection, account: Account, change: dict[str, Any]
    ) -> None:
        plan = Plan(change.get("plan", account.plan))
        if plan != account.plan:
            keep_for(connection, account.id, self.plans.limits[plan].kept_ms)
        if change.get("disabled", account.disabled):
            # Whatever happens to this process: who leases one of them, or has, ends it.
            request_cancel_of_all(connection, account.id)

    def grant(self, account_id: str, body: GrantBody) -> dict[str, Any]:
        """Give an account credits."""
        with self.engine.begin() as connection:
            account = get_account(connection, account_id)
            note(connection, ADMIN, "credits.grant", account.id, **body.model_dump())
            grant(connection, account.id, Credits(body.amount))
            return account_json(get_account(connection, account_id))

    def create_key(
        self, account_id: str, body: Annotated[KeyBody | None, Body()] = None
    ) -> dict[str, Any]:
        """One more key for an account."""
        with self.engine.begin() as connection:
            account = get_account(connection, account_id)
            return issue_key(connection, account.id, self.pepper, body or KeyBody(), ADMIN)

    def list_keys(self, account_id: str) -> dict[str, Any]:
        """An account's keys, those that are no longer good included."""
        with reader(self.engine).begin() as connection:
            account = get_account(connection, account_id)
            keys = list_api_keys(connection, account.id)
        return {"object": "list", "data": [key_json(key) for key in keys]}

    def rotate_key(self, key_id: str) -> dict[str, Any]:
        """A new key in place of any account's, which ends at once."""
        with self.engine.begin() as connection:
            return replace_key(connection, key_id, self.pepper, ADMIN)

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        """End a key's validity at once, on every replica."""
        with self.engine.begin() as connection:
            key = revoke_api_key(connection, key_id)
            note(connection, ADMIN, "key.revoke", key.account_id, key=key.id)
        return key_json(key)

    def list_jobs(
        self, account_id: str, page: Annotated[Page, Depends()], after: str | None = None
    ) -> dict[str, Any]:
        """A page of an account's jobs with their money."""
        with reader(self.engine).begin() as connection:
            account = get_account(connection, account_id)
            found = list_jobs(
                connection,
                account.id,
                after=after,
                limit=page.limit + 1,
                ascending=page.ascending,
            )
        return page.json([job_json(job) for job in found])

    def list_audit(
        self,
        page: Annotated[Page, Depends()],
        account_id: str | None = None,
        after: Number = None,
    ) -> dict[str, Any]:
        """A page of the audit log, of one account or of all."""
        with reader(self.engine).begin() as connection:
            found = list_audit(
                connection,
                account_id=account_id,
                after=after,
                limit=page.limit + 1,
                ascending=page.ascending,
            )
        return page.json([audit_json(entry) for entry in found], key="number")

    async def autoscaling(self) -> dict[str, Any]:
        """What every pool of denoisers and decoders has and is to have, and why."""
        return {"object": "list", "data": await self.explain_scaling()}

    def _end_queued(self, account_id: AccountId) -> None:
        """At once, where no pipeline has anything to stop; those that have are woken.

        No job can be added meanwhile: reserving refuses a disabled account.
        """
        with reader(self.engine).begin() as connection:
            found = open_jobs(connection, account_id)
        for job in found:
            cancel(self.engine, self.store, self.weights, job)
        self.wake()
