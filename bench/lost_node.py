"""A denoiser with a rank on each of two nodes, of which one is lost: a cluster without the rest of
the chain, since one machine has but one node of a whole one.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle

from autoscaling.tiers import GpuTier
from bench.local_nodes import STORE_BYTES, local_nodes
from deployments.config import DenoiserConfig, TierConfig
from deployments.denoiser import Denoiser
from deployments.messages import DenoiseWork
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model
from models.conditioning import Conditioning
from models.request import VideoRequest
from models.stages import load_encoder

WAIT_S = 60.0


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A head with room for the replica and one rank, and one more node."""
    head = {"num_cpus": 1, "resources": {"head": 1}}
    with local_nodes(head, {"num_cpus": 1}) as cluster:
        serve.start(proxy_location="Disabled")
        yield cluster


class LostNode:
    """What the loss costs a video at its at_step: as `bench.recovery` has it of other faults."""

    def __init__(self, checkpoint: Path, folder: Path, checkpoint_steps: int) -> None:
        self.model: Model = load_model(checkpoint)
        self.store = LocalObjectStore(folder)
        self.config = DenoiserConfig(checkpoint_steps=checkpoint_steps, degrees=(2,))

    def recover(self, fields: dict[str, Any], at_step: int) -> tuple[float, float, int, bool]:
        """Seconds until the other rank has ended and of the longest pause, steps that were made
        again, and whether the latents are the same to the bit.
        """
        request = self.model.resolve(fields)
        conditioning = load_encoder(self.model).encode(request, None)
        with two_nodes() as cluster:
            denoiser = self._deploy()
            expected, _ = _run(
                denoiser, "undisturbed", request, conditioning, at_step, lambda: None
            )
            detect_s: list[float] = []
            found, told = _run(
                denoiser,
                "disturbed",
                request,
                conditioning,
                at_step,
                lambda: detect_s.append(_lose_a_node(cluster, denoiser)),
            )
        pause_s = max(after - before for (_, before), (_, after) in pairwise(told))
        again = len(told) - len({step for step, _ in told})
        return detect_s[0], pause_s, again, found == expected

    def _deploy(self) -> DeploymentHandle[Any]:
        deployment = serve.deployment()(Denoiser).options(
            ray_actor_options={"num_cpus": 0.1, "resources": {"head": 0.1}},
            placement_group_bundles=[{"CPU": 0.1, "head": 0.1}, {"CPU": 0.8}, {"CPU": 0.8}],
            placement_group_strategy="PACK",
        )
        tier = TierConfig(tier=GpuTier.A100, torch_threads=1, denoiser=self.config)
        bound = deployment.bind([self.model], self.store, tier)
        return serve.run(bound, name="nodes", route_prefix=None)


def _run(
    denoiser: DeploymentHandle[Any],
    job_id: str,
    request: VideoRequest,
    conditioning: Conditioning,
    at_step: int,
    act: Callable[[], None],
) -> tuple[str, list[tuple[int, float]]]:
    """SHA-256 of the latents, and when which step was told; act is called at at_step."""
    handle: Any = denoiser.options(method_name="denoise", stream=True)
    told = []
    latents: Any = None
    for denoised in handle.remote(DenoiseWork(job_id, 3, 0.0, request), conditioning):
        told.append((denoised.step, time.monotonic()))
        latents = denoised.latents
        if denoised.step == at_step:
            act()
    made = np.asarray(ray.get(latents))
    return hashlib.sha256(made.tobytes()).hexdigest(), told


def _lose_a_node(cluster: Cluster, denoiser: DeploymentHandle[Any]) -> float:
    """Seconds from the loss to the end of the rank on the other node, which cannot go on."""
    describe: Any = denoiser.options(method_name="describe")
    (other,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    seats = describe.remote().result()["ranks"]
    (left,) = [seat["pid"] for seat in seats if seat["node"] != other.node_id]
    process = psutil.Process(left)
    with ThreadPoolExecutor(1) as pool:
        began_s = time.monotonic()
        ended = pool.submit(lambda: (process.wait(WAIT_S), time.monotonic()))
        cluster.remove_node(other, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        _, ended_s = ended.result()
    return ended_s - began_s


def main() -> None:
    """`python -m bench.lost_node CHECKPOINT FOLDER FIELDS AT_STEP CHECKPOINT_STEPS`, as JSON."""
    checkpoint, folder, fields, at_step, checkpoint_steps = sys.argv[1:]
    lost = LostNode(Path(checkpoint), Path(folder), int(checkpoint_steps))
    print(json.dumps(lost.recover(json.loads(fields), int(at_step))))


if __name__ == "__main__":
    main()
