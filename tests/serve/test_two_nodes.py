"""Denoisers without the rest of the chain, on a local cluster of two nodes.

The first has a rank on each, so that what crosses is a ring, and serves two models with memory for
one. The second has one rank and makes the steps of several requests in one. The third is two
replicas of one rank, each with memory for one of two models. The fourth runs requests side by side.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import placement_group, remove_placement_group

from autoscaling.step_scheduler import StepSchedulerConfig
from autoscaling.tiers import GpuTier
from deployments.checkpoints import Checkpoints, checkpoint_key
from deployments.config import DenoiserConfig, TierConfig
from deployments.denoiser import Denoiser
from deployments.messages import DenoiseWork
from deployments.rank_group import GroupBroken, RankGroup
from deployments.step_loop import RequestQuarantined, StepLoop
from jobs.store import LeaseLost
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.checkpoint import unpack
from models.conditioning import ZImageConditioning
from models.denoise import denoise
from models.request import VideoRequest
from models.stages import load_denoiser, load_encoder
from parallel.plan import ParallelPlan
from tests.serve.conftest import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.long]

STORE_BYTES = 100 << 20
NUM_STEPS = 12
SAVED_EVERY = 3
Latents = NDArray[np.float32]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalObjectStore:
    return LocalObjectStore(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def nodes(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that has room for the replica and one rank, and one more node."""
    monkeypatch_module.setenv("RAY_AUTH_MODE", "token")
    monkeypatch_module.setenv("RAY_AUTH_TOKEN", "0" * 64)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "resources": {"head": 1},
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        },
    )
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
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
    serve.start(proxy_location="Disabled")
    models = [model, replace(model, id="other")]
    return serve.run(deployment.bind(models, store, tier), name="nodes", route_prefix=None)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def test_two_nodes_share_a_step_by_a_ring_and_survive_the_loss_of_one(
    nodes: Cluster,
    denoiser: DeploymentHandle[Any],
    store: LocalObjectStore,
    model: Model,
    request_: VideoRequest,
    conditioning: ZImageConditioning,
) -> None:
    *_, alone = denoise(load_denoiser(model), request_, conditioning)
    shared, steps = run(denoiser, "undisturbed", request_, conditioning)
    assert steps == list(range(1, NUM_STEPS + 1))
    assert np.abs(shared - alone.latents.numpy()).max() <= 1e-5
    saved = unpack(store.get(checkpoint_key("undisturbed")))
    assert (saved.plan, saved.state.step) == (ParallelPlan(ring=2), NUM_STEPS)

    (other,) = [node for node in nodes.list_all_nodes() if node is not nodes.head_node]

    def lose_a_node() -> None:
        nodes.remove_node(other, allow_graceful=False)
        nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    again, steps = run(denoiser, "disturbed", request_, conditioning, lose_a_node)
    assert steps == list(range(1, NUM_STEPS + 1))
    assert np.array_equal(again, shared)


def test_the_model_that_was_used_last_stays_and_another_goes(
    denoiser: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    describe: Any = denoiser.options(method_name="describe")

    def models() -> list[str]:
        found: list[str] = describe.remote().result()["models"]
        return found

    assert models() == [request_.model]
    other = request_.model_copy(update={"model": "other"})
    ours, _ = run(denoiser, "ours", request_, conditioning)
    assert models() == [request_.model]
    theirs, _ = run(denoiser, "theirs", other, conditioning)
    assert models() == ["other"]
    assert np.array_equal(ours, theirs)  # the same weights by another name
    again, _ = run(denoiser, "again", request_, conditioning)
    assert np.array_equal(ours, again)
    assert models() == [request_.model]


def test_a_model_in_use_makes_room_only_when_its_request_has_left(
    denoiser: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    other = request_.model_copy(update={"model": "other"})
    expected, _ = run(denoiser, "first", request_, conditioning)
    begun: list[Any] = []

    def ask_for_the_other() -> None:
        handle: Any = denoiser.options(
            method_name="denoise", stream=True, multiplexed_model_id="other"
        )
        begun.append(handle.remote(DenoiseWork("second", 3, 0.0, other), conditioning))

    latents, steps = run(denoiser, "in use", request_, conditioning, ask_for_the_other)
    assert steps == list(range(1, NUM_STEPS + 1))
    assert np.array_equal(latents, expected)
    *_, last = begun[0]
    assert np.array_equal(np.asarray(ray.get(last.latents)), expected)


def test_who_leaves_while_a_model_makes_room_takes_no_memory_along(
    denoiser: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    describe: Any = denoiser.options(method_name="describe")
    other = request_.model_copy(update={"model": "other"})
    run(denoiser, "before", request_, conditioning)

    def ask_for_the_other_and_leave() -> None:
        handle: Any = denoiser.options(
            method_name="denoise", stream=True, multiplexed_model_id="other"
        )
        stream = handle.remote(DenoiseWork("left", 3, 0.0, other), conditioning)
        wait_until(lambda: "left" in describe.remote().result()["jobs"], 20)
        stream.cancel()

    run(denoiser, "in use", request_, conditioning, ask_for_the_other_and_leave)
    run(denoiser, "after", other, conditioning)
    assert describe.remote().result()["models"] == ["other"]


def test_the_same_job_again_ends_the_one_that_nobody_waits_for(
    denoiser: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    """Its pipeline was killed, which Ray tells nobody."""
    begun: list[Any] = []

    def take_over() -> None:
        begun.append(run(denoiser, "moved", request_, conditioning))

    with pytest.raises(LeaseLost):
        run(denoiser, "moved", request_, conditioning, take_over)
    ((latents, steps),) = begun
    assert steps[-1] == NUM_STEPS
    expected, _ = run(denoiser, "expected", request_, conditioning)
    assert np.array_equal(latents, expected)


def test_a_call_of_an_earlier_lease_that_comes_late_ends_nothing(
    denoiser: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    handle: Any = denoiser.options(method_name="denoise", stream=True)
    refused: list[str] = []

    def come_late() -> None:
        try:
            for _ in handle.remote(DenoiseWork("leased", 3, 0.0, request_, lease=1), conditioning):
                refused.append("made a step")
        except LeaseLost:
            refused.append("lease lost")

    made = list[int]()
    for denoised in handle.remote(DenoiseWork("leased", 3, 0.0, request_, lease=2), conditioning):
        made.append(denoised.step)
        if denoised.step == 2:
            come_late()
    assert refused == ["lease lost"]
    assert made == list(range(1, NUM_STEPS + 1))


def test_requests_alike_make_their_steps_in_one(
    batching: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    handle: Any = batching.options(method_name="denoise", stream=True)
    describe: Any = batching.options(method_name="describe")
    # So many steps that the second is there before the first has made all of its own.
    num_steps = 8 * NUM_STEPS
    request_ = request_.model_copy(update={"num_steps": num_steps})
    alone, _ = run(batching, "alone", request_, conditioning)
    before = describe.remote().result()["steps_made"]
    assert before == num_steps
    works = [DenoiseWork(f"together {n}", 3, 0.0, request_) for n in range(2)]
    for stream in [handle.remote(work, conditioning) for work in works]:
        *_, last = stream
        assert last.step == last.num_made == num_steps
        assert np.abs(np.asarray(ray.get(last.latents)) - alone).max() < 1e-4
    assert before + num_steps <= describe.remote().result()["steps_made"] < before + 2 * num_steps


def test_only_who_runs_on_the_dead_rank_is_to_blame(
    side_by_side: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    describe: Any = side_by_side.options(method_name="describe")
    handle: Any = side_by_side.options(method_name="denoise", stream=True)
    long = request_.model_copy(update={"num_steps": 300})
    expected, _ = run(side_by_side, "alone", long, conditioning)

    def kill_rank_of(job_id: str) -> None:
        found = describe.remote().result()
        (rank,) = found["blocks"][job_id]
        os.kill(found["ranks"][rank]["pid"], signal.SIGKILL)

    def be_guilty() -> None:
        for denoised in handle.remote(DenoiseWork("guilty", 3, 0.0, long), conditioning):
            if denoised.step in (10, 20):
                kill_rank_of("guilty")

    with ThreadPoolExecutor(1) as pool:
        bystander = pool.submit(run, side_by_side, "bystander", long, conditioning)
        wait_until(lambda: "bystander" in describe.remote().result()["blocks"], 20)
        with pytest.raises(RequestQuarantined):
            be_guilty()
        latents, steps = bystander.result(60)
    assert steps == list(range(1, long.num_steps + 1))
    assert np.array_equal(latents, expected)


def test_a_request_goes_where_its_model_is(
    replicas: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    requests = [request_, request_.model_copy(update={"model": "other"})]

    def describe(request: VideoRequest) -> Any:
        handle: Any = replicas.options(method_name="describe", multiplexed_model_id=request.model)
        return handle.remote().result()

    for request in requests:  # each replica comes to have one of them
        run(replicas, f"first {request.model}", request, conditioning)
    # Serve's router hears now and then which replica has which model.
    wait_until(lambda: all(describe(r)["models"] == [r.model] for r in requests), 30)
    homes = [describe(request) for request in requests]
    assert [home["models"] for home in homes] == [[request.model] for request in requests]
    assert homes[0]["ranks"] != homes[1]["ranks"]
    for turn in range(5):
        for request in requests:
            run(replicas, f"{turn} {request.model}", request, conditioning)
    for request, home in zip(requests, homes, strict=True):
        now = describe(request)
        assert (now["models"], now["ranks"]) == (home["models"], home["ranks"])
        assert now["steps_made"] == home["steps_made"] + 5 * NUM_STEPS


def test_a_group_that_cannot_form_again_says_why_when_its_health_is_asked(
    nodes: Cluster, model: Model, store: LocalObjectStore
) -> None:
    bundles = placement_group([{"CPU": 0.01}, {"CPU": 0.02}, {"CPU": 0.02}])
    ray.get(bundles.ready())
    group = RankGroup("doomed", bundles, 1, form_timeout_s=60.0)
    loop = StepLoop(group, Checkpoints(store, [model]), DenoiserConfig())

    async def lose_the_bundles() -> None:
        await loop.start()
        loop.check_health()
        group.form_timeout_s = 4.0
        remove_placement_group(bundles)
        async with asyncio.timeout(60):
            while loop.failure is None:
                await asyncio.sleep(0.05)

    asyncio.run(lose_the_bundles())
    with pytest.raises(GroupBroken, match="did not form: after 4 s its placement group is REMOVED"):
        loop.check_health()
