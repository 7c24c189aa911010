"""The configuration is validated whole; secrets are made once and read by their owner alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.app import build
from deployments.config import AppConfig, read_or_create_secret, read_settings
from deployments.launch import port_is_free
from deployments.origin import PACKAGES, check_origin
from models.spec import WeightsMissing

ROOT = Path(__file__).resolve().parents[2]
SERVE_CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
ARGS = SERVE_CONFIG["applications"][0]["args"]


def test_the_embedded_default_is_valid_and_listens_on_loopback() -> None:
    schema = ServeDeploySchema.model_validate(SERVE_CONFIG)
    assert schema.http_options.host == "127.0.0.1"
    AppConfig.model_validate(ARGS)


def test_every_deployment_has_its_resources(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path))
    config = AppConfig.model_validate(ARGS)
    named = {"Ingress", "VideoPipeline", "TextEncoder", "MediaEncoder"}
    for tier in config.tiers:
        named |= {f"Denoiser-{tier.tier}", f"VaeDecoder-{tier.tier}"}
    declared = SERVE_CONFIG["applications"][0]["deployments"]
    assert {deployment["name"] for deployment in declared} == named
    assert all("num_cpus" in deployment["ray_actor_options"] for deployment in declared)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modles": []}, "modles"),
        ({"models": []}, "models"),
        ({"tiers": [{"tier": "h100"}]}, "tier"),
        ({"tiers": [{"tier": "t4"}]}, "local"),
        ({"leases": {"lease_s": 0}}, "lease_s"),
        ({"loras": [{"id": "ink", "path": "a"}, {"id": "ink", "path": "b"}]}, "two are called"),
        ({"operation": {"territories": ["UK"]}}, "territories"),
        ({"tiers": [{"tier": "local", "larger": "local"}]}, "local -> local"),
        ({"tiers": [{"tier": "local", "larger": "a100"}]}, "not served on a100"),
        ({"tiers": [{"tier": "local", "denoiser": {"degrees": [2], "degree": 2}}]}, "degree"),
    ],
)
def test_a_wrong_configuration_names_its_fault(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        AppConfig.model_validate({**ARGS, **change})


def test_a_deploy_without_its_checkpoint_names_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path))
    models = [{"path": str(tmp_path / "none"), "served_on": [{"tier": "local"}]}]
    with pytest.raises(WeightsMissing, match=r"none/manifest\.json"):
        build({**ARGS, "models": models})


def test_our_packages_are_ours() -> None:
    check_origin()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "deployments"])
def test_a_foreign_package_fails_the_deploy_by_name(tmp_path: Path, package: str) -> None:
    foreign = tmp_path / package
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "from deployments.app import build; build({})"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("deployments.origin.ForeignPackage")
    assert f"'{package}' would be imported from {foreign}" in last


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert read_or_create_secret(path, "first") == "first"
    assert read_or_create_secret(path, "second") == "first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_everything_lies_in_the_home_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    settings = read_settings(AppConfig.model_validate(ARGS))
    assert settings.database_url == f"sqlite:///{tmp_path}/home/mutoscope.db"
    assert settings.storage == tmp_path / "home" / "storage"


def test_a_taken_port_is_seen() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not port_is_free("127.0.0.1", server.getsockname()[1])
    assert port_is_free("127.0.0.1", 0)
