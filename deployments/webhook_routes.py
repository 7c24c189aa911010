"""The routes of webhook endpoints, as the official client's `webhooks` resource calls them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from deployments.authentication import Authenticator, account_of, keyed_router
from deployments.database import lock_until_commit, reader
from deployments.paging import Page
from deployments.url_guard import UrlRefused, check_url
from deployments.webhooks import WebhookConfig, event_body, send, signing_secret
from deployments.wire import delivery_json, endpoint_json
from deployments.wire_bodies import NO_CONTROL
from jobs.outbox import DeliveryState, delete_endpoint, list_deliveries, retry_delivery
from jobs.webhooks import (
    Endpoint,
    EventType,
    change_endpoint,
    count_endpoints,
    create_endpoint,
    get_endpoint,
    list_endpoints,
    rotate_endpoint,
)
from models.request import InvalidRequest

DAY_MS = 86_400_000
Url = Annotated[str, Field(max_length=2000, pattern=NO_CONTROL)]
Name = Annotated[str, Field(max_length=100, pattern=NO_CONTROL)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=len(EventType))]


class EndpointBody(BaseModel, frozen=True, extra="forbid"):
    """An endpoint to make."""

    url: Url
    name: Name = ""
    event_types: EventTypes = Field(default_factory=lambda: list(EventType))


class EndpointChange(BaseModel, frozen=True, extra="forbid"):
    """What is to be changed: the fields that are there."""

    url: Url = ""
    name: Name = ""
    event_types: EventTypes = []


class RotateBody(BaseModel, frozen=True, extra="forbid"):
    """Whether deliveries are signed by the old secret, too, for a day."""

    keep_old_secret_active_for_24_hours: bool = False


class TestBody(BaseModel, frozen=True, extra="forbid"):
    """What to send as a sample."""

    event_type: EventType


class WebhookRoutes:
    """A secret is shown when its endpoint is made and when it is rotated."""

    def __init__(
        self, engine: Engine, pepper: bytes, config: WebhookConfig, authenticate: Authenticator
    ) -> None:
        self.engine = engine
        self.pepper = pepper
        self.config = config
        self.authenticate = authenticate

    def router(self) -> APIRouter:
        """All routes; each needs an API key."""
        router = keyed_router(self.authenticate)
        add = router.add_api_route
        endpoints, endpoint = "/v1/webhook_endpoints", "/v1/webhook_endpoints/{endpoint_id}"
        add(endpoints, self.create, methods=["POST"])
        add(endpoints, self.list, methods=["GET"])
        add(endpoint, self.get, methods=["GET"])
        add(endpoint, self.change, methods=["POST"])
        add(endpoint, self.delete, methods=["DELETE"])
        add(f"{endpoint}/rotate_secret", self.rotate, methods=["POST"])
        add(f"{endpoint}/test", self.test, methods=["POST"])
        add("/v1/webhook_event_types", self.list_event_types, methods=["GET"])
        add("/v1/webhook_deliveries", self.list_deliveries, methods=["GET"])
        add("/v1/webhook_deliveries/{delivery_id}/retry", self.retry, methods=["POST"])
        return router

    def create(self, request: Request, body: EndpointBody) -> dict[str, Any]:
        """An endpoint with its secret."""
        self._check(body.url)
        account = account_of(request)
        with self.engine.begin() as connection:
            lock_until_commit(connection, f"webhook endpoints of {account.id}")
            if count_endpoints(connection, account.id) >= self.config.max_endpoints:
                message = f"an account has at most {self.config.max_endpoints} webhook endpoints"
                raise InvalidRequest("url", message)
            endpoint = create_endpoint(connection, account.id, **body.model_dump(mode="json"))
        return endpoint_json(endpoint, self._secret(endpoint.id, endpoint.revision), show=True)

    def list(
        self, request: Request, page: Annotated[Page, Depends()], after: str | None = None
    ) -> dict[str, Any]:
        """A page of the account's endpoints."""
        with reader(self.engine).begin() as connection:
            found = list_endpoints(
                connection,
                account_of(request).id,
                after=after,
                limit=page.limit + 1,
                ascending=page.ascending,
            )
        return page.json(
            [endpoint_json(each, self._secret(each.id, each.revision)) for each in found]
        )

    def get(self, request: Request, endpoint_id: str) -> dict[str, Any]:
        """An endpoint as it stands."""
        endpoint = self._find(endpoint_id, account_of(request).id)
        return endpoint_json(endpoint, self._secret(endpoint.id, endpoint.revision))

    def change(self, request: Request, endpoint_id: str, body: EndpointChange) -> dict[str, Any]:
        """Change the fields that are given."""
        values = body.model_dump(mode="json", exclude_unset=True)
        if "url" in values:
            self._check(body.url)
        with self.engine.begin() as connection:
            endpoint = change_endpoint(connection, endpoint_id, account_of(request).id, values)
        return endpoint_json(endpoint, self._secret(endpoint.id, endpoint.revision))

    def delete(self, request: Request, endpoint_id: str) -> dict[str, Any]:
        """Forget an endpoint, and what was still to be told to it."""
        with self.engine.begin() as connection:
            delete_endpoint(connection, endpoint_id, account_of(request).id)
        return {"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}

    def rotate(
        self, request: Request, endpoint_id: str, body: RotateBody | None = None
    ) -> dict[str, Any]:
        """Another secret, from now on."""
        keep = body is not None and body.keep_old_secret_active_for_24_hours
        with self.engine.begin() as connection:
            endpoint = rotate_endpoint(
                connection, endpoint_id, account_of(request).id, DAY_MS if keep else 0
            )
        return endpoint_json(endpoint, self._secret(endpoint.id, endpoint.revision), show=True)

    async def test(self, request: Request, endpoint_id: str, body: TestBody) -> dict[str, Any]:
        """Send a sample now and say what status came back; InvalidRequest if none did."""
        endpoint = await run_in_threadpool(self._find, endpoint_id, account_of(request).id)
        event_id = "evt_test"
        content = event_body(event_id, body.event_type, "video_test", endpoint.updated_at_ms)
        try:
            status = await send(self.config.guard, self.pepper, endpoint, event_id, content)
        except UrlRefused as error:
            raise InvalidRequest("url", str(error)) from error
        return {
            "object": "webhook_endpoint.test",
            "event_type": body.event_type,
            "status_code": status,
            "success": True,
            "webhook_endpoint_id": endpoint.id,
        }

    def list_event_types(self) -> dict[str, Any]:
        """What an endpoint may ask to be told."""
        return {"object": "list", "data": list(EventType)}

    def list_deliveries(
        self,
        request: Request,
        page: Annotated[Page, Depends()],
        state: DeliveryState | None = None,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> dict[str, Any]:
        """A page of what was told or could not be; `state=dead` lists what was given up."""
        with reader(self.engine).begin() as connection:
            found = list_deliveries(
                connection,
                account_of(request).id,
                state,
                after=after,
                limit=page.limit + 1,
                ascending=page.ascending,
            )
        return page.json([delivery_json(delivery) for delivery in found])

    def retry(self, request: Request, delivery_id: str) -> dict[str, Any]:
        """Send a delivery anew, under the same id."""
        with self.engine.begin() as connection:
            return delivery_json(retry_delivery(connection, delivery_id, account_of(request).id))

    def _find(self, endpoint_id: str, account_id: str) -> Endpoint:
        with reader(self.engine).begin() as connection:
            return get_endpoint(connection, endpoint_id, account_id)

    def _check(self, url: str) -> None:
        try:
            check_url(url, self.config.guard)
        except UrlRefused as error:
            raise InvalidRequest("url", str(error)) from error

    def _secret(self, endpoint_id: str, revision: int) -> str:
        return signing_secret(self.pepper, endpoint_id, revision)
