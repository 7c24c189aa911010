"""A model is offered only where, and for what, its licence allows."""

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from models.catalog import Model, ModelManifest
from models.licence import LicenceForbids, OperationConfig, check_licence

HUNYUAN = {"licence": "Tencent Hunyuan Community", "territory_exclusions": ("EU", "GB", "KR")}
NON_COMMERCIAL = {"licence": "Stability NC", "commercial_use": False}


def licensed(model: Model, licence: dict[str, Any]) -> Model:
    return replace(model, manifest=model.manifest.model_copy(update=licence))


@pytest.mark.parametrize(
    ("licence", "operation"),
    [
        ({}, {}),
        ({}, {"territories": {"KR", "DE"}}),
        (HUNYUAN, {"territories": {"US", "JP"}}),
        (NON_COMMERCIAL, {"commercial": False}),
    ],
)
def test_what_a_licence_allows_is_offered(
    model: Model, licence: dict[str, Any], operation: dict[str, Any]
) -> None:
    check_licence(licensed(model, licence), OperationConfig.model_validate(operation))


@pytest.mark.parametrize(
    ("licence", "operation", "reason"),
    [
        (HUNYUAN, {"territories": {"US", "KR"}}, "excludes KR"),
        (HUNYUAN, {"territories": {"DE"}}, "excludes DE"),
        (HUNYUAN, {}, r"name your `operation\.territories`"),
        (NON_COMMERCIAL, {"territories": {"US"}}, "non-commercial"),
    ],
)
def test_what_a_licence_excludes_is_refused_with_the_reason(
    model: Model, licence: dict[str, Any], operation: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LicenceForbids, match=reason) as refused:
        check_licence(licensed(model, licence), OperationConfig.model_validate(operation))
    assert "licence_override" in str(refused.value)


@pytest.mark.parametrize("code", ["UK", "gb", "GBR", "EU"])
def test_a_mistyped_country_is_none(code: str) -> None:
    with pytest.raises(ValidationError):
        OperationConfig.model_validate({"territories": {code}})


def test_a_mistyped_exclusion_is_none(model: Model) -> None:
    manifest = json.loads(model.manifest.model_dump_json())
    ModelManifest.model_validate({**manifest, "territory_exclusions": ["EU", "GB"]})
    with pytest.raises(ValidationError):
        ModelManifest.model_validate({**manifest, "territory_exclusions": ["UK"]})
