"""Every route as its OpenAPI document says, under inputs that schemathesis makes up."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from pytest_httpserver import HTTPServer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import Engine, update

from credits.accounts import Account, accounts
from media.renditions import Rendition, rendition_key
from tests.conftest import ADMIN_KEY
from tests.database.conftest import Door, end_next_job
from tests.database.test_derived import write_mp4

CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WAITS = "/v1/videos/sync"  # until the video is there: asked by one who has no credits for it
MAX_EXAMPLES = 12
# What no input alone can reach here: no video is made, no characters are, no webhook is sent.
NEVER_DONE = {
    "POST /v1/videos/sync",
    "POST /v1/videos/characters",
    "GET /v1/videos/characters/{name}",
    "POST /v1/webhook_deliveries/{delivery_id}/retry",
}


class Tenant:
    """alice, who has one of everything that a path can name; the operator changes bob."""

    def __init__(self, engine: Engine, door: Door, mp4: bytes, hook: str) -> None:
        self.engine, self.door, self.mp4 = engine, door, mp4
        self.endpoint = {"url": hook, "event_types": ["video.completed"]}
        self.call = door.as_account()
        self.made = ""
        with engine.begin() as connection:
            connection.execute(update(accounts).values(max_jobs=10**6, available=10**9))

    def video(self) -> str:
        """A finished one: the last that was made, unless it is deleted."""
        if self.made and self.call("GET", f"/v1/videos/{self.made}").status_code == 200:
            return self.made
        self.made = made = str(self.call("POST", "/v1/videos", json={"prompt": "x"}).json()["id"])
        while end_next_job(self.engine, self.door.store, content=self.mp4).id != made:
            continue
        for rendition in (Rendition.THUMBNAIL, Rendition.SPRITESHEET):
            self.door.store.put(rendition_key(made, rendition), b"picture")
        return made

    def named(self, parameter: str) -> str:
        """What a path's parameter may hold."""
        match parameter:
            case "video_id":
                return self.video()
            case "account_id":
                return "bob"
            case "model_id":
                return "z-image-video"
            case "key_id":
                return str(self.call("POST", "/v1/keys", json={}).json()["id"])
            case "endpoint_id":
                if not (made := self.call("GET", "/v1/webhook_endpoints").json()["data"]):
                    made = [self.call("POST", "/v1/webhook_endpoints", json=self.endpoint).json()]
                return str(made[0]["id"])
        return "1"

    def make_real(self, case: Any) -> None:
        """A path that leads somewhere and, where the schema does not say what may be, a body."""
        case.path_parameters = {name: self.named(name) for name in case.path_parameters or {}}
        bodies: dict[str, dict[str, Any]] = {
            "/v1/videos": {"prompt": "x"},
            "/api/v1/video/generate": {"prompt": "x"},
            "/api/v1/video/estimate": {"prompt": "x"},
            "/v1/videos/{video_id}/remix": {"prompt": "y"},
            "/v1/videos/edits": {"prompt": "y", "video": self.video()},
            "/v1/videos/extensions": {"prompt": "y", "video": self.video(), "seconds": "1"},
            "/v1/webhook_endpoints": self.endpoint,
            "/v1/webhook_endpoints/{endpoint_id}": {"name": "x"},
            "/v1/webhook_endpoints/{endpoint_id}/test": {"event_type": "video.completed"},
        }
        if case.method == "POST" and (body := bodies.get(case.operation.path)) is not None:
            case.body, case.media_type = body, "application/json"
            case.query, case.headers = {}, {}


@pytest.mark.parametrize(
    "database_url",
    [pytest.param("sqlite", marks=pytest.mark.long), "postgresql"],
    indirect=True,
)
def test_every_route_is_as_it_says(
    engine: Engine, door: Door, alice: Account, an_account: Callable[..., Account],
    tmp_path: Path, httpserver: HTTPServer,
) -> None:  # fmt: skip
    httpserver.expect_request("/hook").respond_with_data(status=204)
    an_account("bob")
    schema = schemathesis.openapi.from_asgi("/openapi.json", door.client.app)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 40
    tenant = Tenant(engine, door, write_mp4(tmp_path / "made.mp4"), httpserver.url_for("/hook"))
    an_account("poor", credits=0)
    never, num_negated = set(), 0
    for operation in operations:
        seen = explore(operation, GenerationMode.POSITIVE, tenant)
        with contextlib.suppress(Unsatisfiable):  # where there is nothing that could be wrong
            seen |= explore(operation, GenerationMode.NEGATIVE, tenant)
            num_negated += 1
        if not any(status < 300 for status in seen):
            never.add(f"{operation.method.upper()} {operation.path}")
    assert never == NEVER_DONE
    assert num_negated > 20


def explore(operation: Any, mode: GenerationMode, tenant: Tenant) -> set[int]:
    """Statuses that inputs of a kind are answered with, each as the document says."""
    seen: set[int] = set()

    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def call(case: Any, real: bool) -> None:
        if real:
            tenant.make_real(case)
        key = ADMIN_KEY if operation.path.startswith("/admin/") else "key-alice"
        if operation.path == WAITS:
            key = "key-poor"
        headers = {"authorization": f"Bearer {key}"}
        seen.add(case.call_and_validate(headers=headers, checks=CHECKS).status_code)

    call()
    return seen
