"""The whole application on a cluster of several nodes, each with the GPUs of one tier, by name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from bench.clusters import free_port, shipped_config
from bench.local_nodes import local_nodes
from client.client import Client, Server
from tests.conftest import ADMIN_KEY
from tests.serve.conftest import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[3]
TIERS = ("t4", "a100")
SMALL, LARGE = "64x64", "96x64"


def tiered_config(port: int) -> dict[str, Any]:
    """As on Kubernetes: pools from zero up, on nodes that are labelled; waits of seconds."""
    config = shipped_config()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    arguments = application["args"]
    arguments["models"] = [
        {
            "path": "models/demo",
            "served_on": [{"tier": "t4", "max_area": 64 * 64}, {"tier": "a100"}],
        }
    ]
    arguments["tiers"] = [
        {
            "tier": tier,
            "jobs_at_once": 4,
            "torch_threads": 1,
            "scaling": {"cold_start_s": 5.0, "keep_warm_s": 4.0},
        }
        for tier in TIERS
    ]
    kept = [d for d in application["deployments"] if not d["name"].endswith("-local")]
    scaled = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": 1,
    }
    for deployment in kept:
        deployment["ray_actor_options"] = {"num_cpus": 0.01, "resources": {"home": 0.01}}
    for tier in TIERS:
        labels = {"gpu-tier": tier}
        kept.append(
            {
                "name": f"Denoiser-{tier}",
                "max_ongoing_requests": 5,
                "graceful_shutdown_timeout_s": 10,
                "ray_actor_options": {"num_cpus": 0.01, "label_selector": labels},
                "placement_group_bundles": [{"CPU": 0.01}, {"CPU": 0.1, "GPU": 0.7}],
                "placement_group_bundle_label_selector": [labels, labels],
                "placement_group_strategy": "STRICT_PACK",
                "autoscaling_config": scaled,
            }
        )
        kept.append(
            {
                "name": f"VaeDecoder-{tier}",
                "max_ongoing_requests": 4,
                "ray_actor_options": {
                    "num_cpus": 0.01,
                    "num_gpus": 0.3,
                    "label_selector": {"ray.io/accelerator-type": tier.upper()},
                },
                "autoscaling_config": scaled,
            }
        )
    application["deployments"] = kept
    return config


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A head without GPUs and a node of each tier, and a server with a local account."""
    home, port = tmp_path_factory.mktemp("tiers"), free_port()
    with pytest.MonkeyPatch.context() as shell:
        shell.setenv("RAY_AUTH_MODE", "token")
        # Ray reads it once in a process: the other clusters of the tests have the same.
        shell.setenv("RAY_AUTH_TOKEN", "0" * 64)
        shell.setenv("MUTOSCOPE_HOME", str(home))
        shell.setenv("MUTOSCOPE_ADMIN_KEY", ADMIN_KEY)
        shell.setenv("PYTHONPATH", str(ROOT))
        shell.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        head = {"num_cpus": 1, "resources": {"home": 1}}
        nodes = [
            {
                "num_cpus": 1,
                "num_gpus": 1,
                "labels": {"gpu-tier": tier, "ray.io/accelerator-type": tier.upper()},
            }
            for tier in TIERS
        ]
        with local_nodes(head, *nodes):
            schema = ServeDeploySchema.model_validate(tiered_config(port))
            client = serve_start(
                http_options=schema.http_options.model_dump(),
                proxy_location=schema.proxy_location,
            )
            client.deploy_apps(schema)
            wait_until(lambda: application().status == "RUNNING", 180)
            yield Server(f"http://127.0.0.1:{port}", (home / "api_key").read_text())


def application() -> Any:
    return serve.status().applications["mutoscope"]


def replicas(deployment: str) -> int:
    states: dict[str, int] = application().deployments[deployment].replica_states
    return sum(states.values())


def ask(server: Server, key: str) -> httpx.Response:
    url = f"{server.url}/admin/v1/autoscaling"
    return httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def pools(server: Server) -> dict[str, dict[str, Any]]:
    """What the operator is told."""
    return {entry["deployment"]: entry for entry in ask(server, ADMIN_KEY).json()["data"]}


def node_of_rank(tier: str) -> dict[str, str]:
    """The labels of the node on which the tier's rank works."""
    handle: Any = serve.get_deployment_handle(f"Denoiser-{tier}", "mutoscope")
    (rank,) = handle.describe.remote().result()["ranks"]
    labels: dict[str, str] = next(
        node["Labels"] for node in ray.nodes() if node["NodeID"] == rank["node"]
    )
    return labels


@pytest.mark.parametrize(("tier", "size", "other"), [("t4", SMALL, "a100"), ("a100", LARGE, "t4")])
def test_a_pool_goes_from_nothing_to_where_its_tier_is_and_back(
    tiers: Server, tier: str, size: str, other: str
) -> None:
    names = [f"Denoiser-{tier}", f"VaeDecoder-{tier}"]
    wait_until(lambda: all(replicas(name) == 0 for name in names), 60)
    wait_until(lambda: names[0] in pools(tiers), 30)
    idle = pools(tiers)[names[0]]
    assert (idle["wanted"], idle["reason"]) == (0, "idle")
    with Client(tiers) as client:
        fields = {"prompt": "a red circle moving right", "size": size, "num_frames": 5}
        video = client.create({**fields, "num_steps": 40})
    why: list[dict[str, Any]] = []

    def is_asked_for() -> bool:
        why.append(pools(tiers)[names[0]])
        return bool(why[-1]["wanted"])

    wait_until(is_asked_for, 30)
    assert why[-1]["reason"] in ("open", "warm", "due", "coming")
    assert why[-1]["queued_gpu_seconds"] + why[-1]["running_gpu_seconds"] > 0
    with Client(tiers) as client:
        *_, last = client.follow(video["id"])
        assert client.get(video["id"])["status"] == "completed", last
    ended_s = time.monotonic()
    assert node_of_rank(tier)["gpu-tier"] == tier
    assert replicas(f"Denoiser-{other}") == 0
    wait_until(lambda: all(replicas(name) == 0 for name in names), 60)
    assert time.monotonic() - ended_s >= 2.0  # both of its delays of a second
    wait_until(lambda: pools(tiers)[names[0]]["reason"] == "idle", 20)


def test_nobody_but_the_operator_is_told(tiers: Server) -> None:
    assert ask(tiers, tiers.api_key).status_code == 401
