"""The HTTP door: authenticates, admits, shows; any replica answers any request."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from credits.plans import Plan, PlanTable
from credits.pricing import PriceTable, WorkWeights
from credits.rates import RequestRate
from deployments.admin_routes import AdminRoutes, ExplainScaling
from deployments.admission import Admission, Offer
from deployments.authentication import AdminAuthenticator, Authenticator
from deployments.body_limit import BodyLimit
from deployments.config import LimitsConfig, LocalAccountConfig, read_admin_key, read_pepper
from deployments.create_routes import CreateRoutes, Waker
from deployments.credit_routes import CreditRoutes
from deployments.database import migrate, open_database
from deployments.errors import ANSWERS, envelope, install_error_handlers
from deployments.key_routes import KeyRoutes
from deployments.live_progress import PATH, LiveProgress
from deployments.local_account import ensure_local_account
from deployments.metrics import metrics_response
from deployments.openapi import describe
from deployments.progress import EventFeed
from deployments.rate_headers import RateHeaders
from deployments.url_guard import UrlGuardConfig
from deployments.video_routes import VideoRoutes
from deployments.webhook_routes import WebhookRoutes
from deployments.webhooks import WebhookConfig
from media.object_store import LocalObjectStore
from models.request import InvalidRequest


@dataclass(frozen=True, slots=True)
class IngressParts:
    """All that an ingress replica is made of; plain values, so that it can be pickled."""

    home: Path
    database_url: str
    local_account: LocalAccountConfig | None
    store: LocalObjectStore
    offers: dict[str, Offer]
    prices: PriceTable
    plans: PlanTable
    weights: WorkWeights
    limits: LimitsConfig
    rates: dict[Plan, RequestRate]
    webhooks: WebhookConfig
    image_urls: UrlGuardConfig


@serve.ingress()
class Ingress:
    """Builds its app late, inside the replica: an app made at import would be pickled, and the
    replica would work on a copy of its state.
    """

    def __init__(self, parts: IngressParts, pipeline: DeploymentHandle[Any]) -> None:
        self.parts = parts
        self.pipeline = pipeline

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after __init__."""
        return create_app(self.parts, self._wake, self._explain_scaling)

    def _wake(self) -> None:
        self.pipeline.wake.remote()

    async def _explain_scaling(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self.pipeline.explain_scaling.remote()
        return found


def create_app(parts: IngressParts, wake: Waker, explain_scaling: ExplainScaling) -> FastAPI:
    """The ASGI application over a database that it migrates first; needs no Ray."""
    parts.home.mkdir(parents=True, exist_ok=True)
    pepper = read_pepper(parts.home, parts.database_url)
    engine = open_database(parts.database_url)
    migrate(engine)
    if parts.local_account is not None:
        ensure_local_account(engine, parts.local_account, parts.home, pepper)
    admission = Admission(engine, parts.store, parts.offers, parts.prices, parts.plans)
    authenticate = Authenticator(engine, pepper, parts.rates)
    feed = EventFeed(engine)
    videos = VideoRoutes(engine, admission, parts.store, authenticate, parts.weights, wake, feed)
    create = CreateRoutes(
        engine,
        admission,
        parts.store,
        authenticate,
        parts.limits,
        parts.image_urls,
        wake,
        feed,
    )
    admin = AdminRoutes(
        engine,
        parts.store,
        pepper,
        parts.plans,
        parts.weights,
        AdminAuthenticator(read_admin_key(parts.home, parts.database_url)),
        wake,
        explain_scaling,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await feed.listener.close()
        engine.dispose()

    app = FastAPI(title="Mutoscope", version="0.1.0", lifespan=lifespan)
    app.add_middleware(RateHeaders)
    app.add_middleware(BodyLimit, max_bytes=parts.limits.max_body_bytes)
    install_error_handlers(app)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.include_router(create.router())
    app.include_router(videos.router())
    app.include_router(CreditRoutes(engine, authenticate).router())
    app.include_router(KeyRoutes(engine, pepper, authenticate).router())
    app.include_router(WebhookRoutes(engine, pepper, parts.webhooks, authenticate).router())
    app.include_router(admin.router())
    app.mount(PATH, LiveProgress(engine, feed, authenticate, videos.video_json).app())
    app.add_api_route(
        "/metrics",
        lambda: metrics_response(engine),
        methods=["GET"],
        response_class=PlainTextResponse,
    )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]  # FastAPI's documented way
    app.add_api_route("/healthz", lambda: {"status": "ok"}, methods=["GET"])
    return app


async def _answer_validation(_request: Any, error: Exception) -> JSONResponse:
    """FastAPI's own checks of query parameters and headers answer like ours."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    answer = ANSWERS[InvalidRequest]
    return JSONResponse(envelope(answer, f"{param}: {first['msg']}", param), answer.status)
