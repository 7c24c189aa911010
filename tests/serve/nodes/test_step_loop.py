"""Requests inside of a denoiser: who may end whom, who is to blame, what is counted."""

import asyncio
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import placement_group, remove_placement_group

from autoscaling.tiers import GpuTier
from bench.ranks import run_ranks
from deployments.checkpoints import Checkpoints
from deployments.config import DenoiserConfig, TierConfig
from deployments.denoiser import Denoiser
from deployments.held import RequestQuarantined
from deployments.messages import DenoiseWork
from deployments.rank_group import GroupBroken, RankGroup
from deployments.step_loop import StepLoop
from jobs.store import LeaseLost
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model
from models.conditioning import ZImageConditioning
from models.request import VideoRequest
from models.stages import load_denoiser
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan
from tests.serve.conftest import wait_until
from tests.serve.nodes.conftest import NUM_STEPS, run

pytestmark = [pytest.mark.serve, pytest.mark.long]

# Longer than Ray takes to forget what nobody refers to any more.
LATE_S = 3.0
COLLECTIVE = re.compile(r"ray_mutoscope_collective_(?P<what>calls|bytes)_total")


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


def test_who_reads_a_stream_late_gets_its_latents(
    batching: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    handle: Any = batching.options(method_name="denoise", stream=True)
    describe: Any = batching.options(method_name="describe")
    expected, _ = run(batching, "at once", request_, conditioning)
    before = describe.remote().result()["steps_made"]
    stream = handle.remote(DenoiseWork("late", 3, 0.0, request_), conditioning)

    def has_ended() -> bool:
        found = describe.remote().result()
        return found["steps_made"] == before + NUM_STEPS and not found["jobs"]

    wait_until(has_ended, 30)
    time.sleep(LATE_S)
    *_, last = stream
    assert np.array_equal(np.asarray(ray.get(last.latents)), expected)


def test_requests_alike_make_their_steps_in_one(
    batching: DeploymentHandle[Any], request_: VideoRequest, conditioning: ZImageConditioning
) -> None:
    handle: Any = batching.options(method_name="denoise", stream=True)
    describe: Any = batching.options(method_name="describe")
    # So many steps that the second is there before the first has made all of its own.
    num_steps = 8 * NUM_STEPS
    request_ = request_.model_copy(update={"num_steps": num_steps})
    at_first = describe.remote().result()["steps_made"]
    alone, _ = run(batching, "alone", request_, conditioning)
    before = describe.remote().result()["steps_made"]
    assert before == at_first + num_steps
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


def test_a_group_that_cannot_form_again_says_why_when_its_health_is_asked(
    nodes: Cluster, model: Model, store: LocalObjectStore
) -> None:
    bundles = placement_group([{"CPU": 0.01}, {"CPU": 0.02}, {"CPU": 0.02}])
    ray.get(bundles.ready())
    group = RankGroup("doomed", bundles, 1, form_timeout_s=60.0)
    loop = StepLoop(group, Checkpoints(store, [model]), DenoiserConfig(), lambda _: None)

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


def _send(rank: int, request: VideoRequest, conditioning: ZImageConditioning, folder: Path) -> Any:
    denoiser = load_denoiser(load_model(folder))
    meshes = MeshBuilder(rank, 2)
    denoiser.use(meshes.mesh(ParallelPlan(ulysses=2), (0, 1)))
    denoiser.step(request, conditioning, denoiser.start(request, conditioning))
    return meshes.traffic.take()


def test_what_ranks_send_each_other_is_told_as_metrics(
    nodes: Cluster,
    model: Model,
    store: LocalObjectStore,
    request_: VideoRequest,
    conditioning: ZImageConditioning,
) -> None:
    config = DenoiserConfig(degrees=(2,))
    deployment = serve.deployment()(Denoiser).options(
        name="Counted",
        ray_actor_options={"num_cpus": 0.01},
        placement_group_bundles=[{"CPU": 0.01}, {"CPU": 0.02}, {"CPU": 0.02}],
        placement_group_strategy="PACK",
    )
    tier = TierConfig(tier=GpuTier.LOCAL, torch_threads=1, denoiser=config)
    counted = serve.run(deployment.bind([model], store, tier), name="counted", route_prefix=None)
    *_, expected = run_ranks(2, _send, request_, conditioning, model.folder)
    try:
        run(counted, "counted", request_, conditioning)
        want = {
            **{("calls", name): 2 * NUM_STEPS * n for name, n in expected.calls.items()},
            **{("bytes", name): 2 * NUM_STEPS * n for name, n in expected.bytes_sent.items()},
        }
        assert all(want.values())
        wait_until(lambda: _read_collectives("counted") == want, 30)
    finally:
        serve.delete("counted")


def _read_collectives(application: str) -> dict[tuple[str, str], float]:
    """What the nodes' metrics ports tell of an application's ranks."""
    told: dict[tuple[str, str], float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
            for family in text_string_to_metric_families(
                httpx.get(f"http://{address}/metrics").text
            ):
                for sample in family.samples:
                    match = COLLECTIVE.match(sample.name)
                    if match and sample.labels["application"] == application:
                        told[match["what"], sample.labels["collective"]] = sample.value
    return told
