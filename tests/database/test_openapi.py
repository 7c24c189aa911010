"""Every route as its OpenAPI document says, under inputs that schemathesis makes up."""

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from credits.accounts import Account
from tests.conftest import ADMIN_KEY
from tests.database.conftest import Door

CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WAITS = "/v1/videos/sync"  # until the video is there: asked by one who has no credits for it
MAX_EXAMPLES = 20


@pytest.mark.parametrize(
    "database_url",
    [pytest.param("sqlite", marks=pytest.mark.long), "postgresql"],
    indirect=True,
)
def test_every_route_is_as_it_says(
    door: Door, alice: Account, an_account: Callable[..., Account]
) -> None:
    an_account("poor", credits=0)
    schema = schemathesis.openapi.from_asgi("/openapi.json", door.client.app)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 40
    for operation in operations:

        @settings(
            max_examples=MAX_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            is_admin = case.operation.path.startswith("/admin/")
            key = ADMIN_KEY if is_admin else "key-alice"
            if case.operation.path == WAITS:
                key = "key-poor"
            case.call_and_validate(headers={"authorization": f"Bearer {key}"}, checks=CHECKS)

        call()
