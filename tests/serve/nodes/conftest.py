"""Denoisers without the rest of the chain, on a local cluster of two nodes.

The first has a rank on each, so that what crosses is a ring, and serves two models with memory for
one. The second has one rank and makes the steps of several requests in one. The third is two
replicas of one rank, each with memory for one of two models. The fourth runs requests side by side.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle

from autoscaling.step_scheduler import StepSchedulerConfig
from autoscaling.tiers import GpuTier
from bench.lost_node import two_nodes
from deployments.config import DenoiserConfig, TierConfig
from deployments.denoiser import Denoiser
from deployments.messages import DenoiseWork
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.conditioning import ZImageConditioning
from models.request import VideoRequest
from models.stages import load_encoder

NUM_STEPS = 12
SAVED_EVERY = 3
Latents = NDArray[np.float32]


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalObjectStore:
    return LocalObjectStore(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="package")
def nodes(shell: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that has room for the replica and one rank, and one more node."""
    shell.setenv("RAY_AUTH_MODE", "token")
    shell.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def shell() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="package")
def denoiser(nodes: Cluster, model: Model, store: LocalObjectStore) -> DeploymentHandle[Any]:
    config = DenoiserConfig(
        checkpoint_steps=SAVED_EVERY, degrees=(2,), model_memory_bytes=model.denoiser_bytes
    )
    tier = TierConfig(tier=GpuTier.A100, torch_threads=1, denoiser=config)
    deployment = serve.deployment()(Denoiser).options(
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.1, "resources": {"head": 0.1}},
        placement_group_bundles=[{"CPU": 0.1, "head": 0.1}, {"CPU": 0.8}, {"CPU": 0.8}],
        placement_group_strategy="PACK",
    )
    models = [model, replace(model, id="other")]
    return serve.run(deployment.bind(models, store, tier), name="nodes", route_prefix=None)


@pytest.fixture(scope="package")
def batching(nodes: Cluster, model: Model, store: LocalObjectStore) -> DeploymentHandle[Any]:
    config = DenoiserConfig(scheduler=StepSchedulerConfig(max_batch=2))
    tier = TierConfig(tier=GpuTier.LOCAL, torch_threads=1, denoiser=config)
    deployment = serve.deployment()(Denoiser).options(
        name="Batching",
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.01},
        placement_group_bundles=[{"CPU": 0.01}, {"CPU": 0.05}],
        placement_group_strategy="PACK",
    )
    return serve.run(deployment.bind([model], store, tier), name="batching", route_prefix=None)


@pytest.fixture(scope="package")
def replicas(nodes: Cluster, model: Model, store: LocalObjectStore) -> DeploymentHandle[Any]:
    config = DenoiserConfig(model_memory_bytes=model.denoiser_bytes)
    tier = TierConfig(tier=GpuTier.T4, torch_threads=1, denoiser=config)
    deployment = serve.deployment()(Denoiser).options(
        name="Replicas",
        num_replicas=2,
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.01},
        placement_group_bundles=[{"CPU": 0.01}, {"CPU": 0.02}],
        placement_group_strategy="PACK",
    )
    models = [model, replace(model, id="other")]
    return serve.run(deployment.bind(models, store, tier), name="replicas", route_prefix=None)


@pytest.fixture(scope="package")
def side_by_side(nodes: Cluster, model: Model, store: LocalObjectStore) -> DeploymentHandle[Any]:
    tier = TierConfig(
        tier=GpuTier.A10G,
        torch_threads=1,
        denoiser=DenoiserConfig(degrees=(1,), checkpoint_steps=9),
    )
    deployment = serve.deployment()(Denoiser).options(
        name="SideBySide",
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.01},
        placement_group_bundles=[{"CPU": 0.01}, {"CPU": 0.02}, {"CPU": 0.02}],
        placement_group_strategy="PACK",
    )
    return serve.run(deployment.bind([model], store, tier), name="side", route_prefix=None)


@pytest.fixture
def request_(a_request: Callable[..., VideoRequest]) -> VideoRequest:
    """One text, so that the two ranks share its tokens."""
    return a_request(num_steps=NUM_STEPS, guidance_scale=1.0)


@pytest.fixture
def conditioning(model: Model, request_: VideoRequest) -> ZImageConditioning:
    return load_encoder(model).encode(request_, None)


def run(
    denoiser: DeploymentHandle[Any],
    job_id: str,
    request: VideoRequest,
    conditioning: ZImageConditioning,
    act: Callable[[], None] = lambda: None,
) -> tuple[Latents, list[int]]:
    """The latents and the steps that were told; act is called once, after the fifth."""
    handle: Any = denoiser.options(
        method_name="denoise", stream=True, multiplexed_model_id=request.model
    )
    steps = []
    latents: Any = None
    for denoised in handle.remote(DenoiseWork(job_id, 3, 0.0, request), conditioning):
        steps.append(denoised.step)
        latents = denoised.latents
        if denoised.step == 5:
            act()
    return np.asarray(ray.get(latents)), steps
