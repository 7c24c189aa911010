"""A denoiser whose node is to go hands its requests over, and nothing is made again."""

import time
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.serve.handle import DeploymentHandle

from autoscaling.tiers import GpuTier
from bench.local_nodes import STORE_BYTES
from deployments.checkpoints import checkpoint_key
from deployments.config import DenoiserConfig, TierConfig
from deployments.denoiser import Denoiser
from deployments.held import HandedOver
from deployments.messages import DenoiseWork
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.checkpoint import unpack
from models.conditioning import ZImageConditioning
from models.request import VideoRequest

pytestmark = [pytest.mark.serve, pytest.mark.long]

NOTICE_S = 60


def deploy(model: Model, store: LocalObjectStore) -> DeploymentHandle[Any]:
    """On a node that has `spot`; a checkpoint is never due of itself."""
    config = DenoiserConfig(checkpoint_s=1e6, degrees=(1,))
    tier = TierConfig(tier=GpuTier.A100, torch_threads=1, denoiser=config)
    deployment = serve.deployment()(Denoiser).options(
        name="Leaving",
        max_ongoing_requests=4,
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0.01, "resources": {"spot": 0.01}},
        placement_group_bundles=[{"CPU": 0.01, "spot": 0.01}, {"CPU": 0.02, "spot": 0.01}],
        placement_group_strategy="STRICT_PACK",
    )
    return serve.run(deployment.bind([model], store, tier), name="leaving", route_prefix=None)


def give_notice(address: str, node_id: str) -> None:
    """What KubeRay does when a cloud takes a node back."""
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    gone_ms = time.time_ns() // 1_000_000 + 1000 * NOTICE_S
    client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
    accepted, _ = client.drain_node(node_id, reason, "spot interruption", gone_ms)
    assert accepted


def stream(
    denoiser: DeploymentHandle[Any], job_id: str, request: VideoRequest, conditioning: Any
) -> Any:
    handle: Any = denoiser.options(
        method_name="denoise", stream=True, multiplexed_model_id=request.model
    )
    return handle.remote(DenoiseWork(job_id, 3, 0.0, request), conditioning)


def test_a_node_that_is_told_to_go_loses_no_step(
    nodes: Cluster,
    model: Model,
    store: LocalObjectStore,
    request_: VideoRequest,
    conditioning: ZImageConditioning,
) -> None:
    request = request_.model_copy(update={"num_steps": 100, "width": 512, "height": 512})
    spot: dict[str, Any] = {
        "num_cpus": 1,
        "resources": {"spot": 1},
        "object_store_memory": STORE_BYTES,
    }
    leaving = nodes.add_node(**spot)
    nodes.wait_for_nodes()
    denoiser = deploy(model, store)
    *_, last = stream(denoiser, "expected", request, conditioning)
    expected = np.array(ray.get(last.latents))
    staying = nodes.add_node(**spot)
    steps: list[int] = []

    def follow() -> None:
        for denoised in stream(denoiser, "moved", request, conditioning):
            steps.append(denoised.step)
            if denoised.step == 5:
                give_notice(nodes.address, leaving.node_id)

    with pytest.raises(HandedOver):
        follow()
    assert 5 < steps[-1] < request.num_steps
    assert unpack(store.get(checkpoint_key("moved"))).state.step == steps[-1]
    again = list(stream(denoiser, "moved", request, conditioning))
    left = range(steps[-1] + 1, request.num_steps + 1)
    assert [denoised.step for denoised in again] == list(left)
    assert np.array_equal(np.asarray(ray.get(again[-1].latents)), expected)
    serve.delete("leaving")
    for node in (leaving, staying):
        nodes.remove_node(node)
