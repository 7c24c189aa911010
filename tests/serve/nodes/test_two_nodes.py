"""Ranks on two nodes, and models that make room for each other."""

from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle

from bench.local_nodes import STORE_BYTES
from deployments.checkpoints import checkpoint_key
from deployments.messages import DenoiseWork
from media.object_store import LocalObjectStore
from models.catalog import Model
from models.checkpoint import unpack
from models.conditioning import ZImageConditioning
from models.denoise import denoise
from models.request import VideoRequest
from models.stages import load_denoiser
from parallel.plan import ParallelPlan
from tests.serve.conftest import wait_until
from tests.serve.nodes.conftest import NUM_STEPS, run

pytestmark = [pytest.mark.serve, pytest.mark.long]


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
