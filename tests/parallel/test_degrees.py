"""A request that runs now on these ranks, now on others, ends as on one."""

from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bench.ranks import run_ranks
from models.catalog import load_model
from models.denoise import denoise, park, resume
from models.stages import load_denoiser, load_encoder
from models.weights import choose_device
from parallel.mesh import MeshBuilder, aligned_groups
from parallel.plan import ParallelPlan

ALONE, TEXTS = ParallelPlan(), ParallelPlan(guidance=2)
TOKENS, ALL = ParallelPlan(ulysses=2), ParallelPlan(guidance=2, ulysses=2)
RING = ParallelPlan(guidance=2, ring=2)
EVERYONE = (0, 1, 2, 3)
# Some ranks have made fewer steps than others when all of them meet.
SCHEDULE = (
    (TEXTS, (0, 1)), (ALL, EVERYONE), (TOKENS, (2, 3)), (ALONE, (1,)), (RING, EVERYONE),
    (TOKENS, (0, 1)), (TEXTS, (2, 3)), (ALL, EVERYONE),
)  # fmt: skip
FIELDS = {"prompt": "a red circle", "num_steps": len(SCHEDULE), "seed": 7, "guidance_scale": 2.0}


def follow_schedule(rank: int, folder: Path) -> NDArray[np.float32]:
    model = load_model(folder)
    request = model.resolve(FIELDS)
    conditioning = load_encoder(model).encode(request, None)
    denoiser = load_denoiser(model)
    meshes = MeshBuilder(rank, len(EVERYONE))
    parked = park(denoiser.start(request, conditioning))
    for plan, ranks in SCHEDULE:
        if rank in ranks:
            denoiser.use(meshes.mesh(plan, ranks))
            state = resume(parked, choose_device())
            (made,) = denoiser.step_all([request], [conditioning], [state])
            parked = park(made)
        handed_on = [parked]
        dist.broadcast_object_list(handed_on, src=ranks[0])
        (parked,) = handed_on
    return parked.latents


def test_every_degree_and_block_in_turn_ends_as_on_one_rank(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    request = model.resolve(FIELDS)
    conditioning = load_encoder(model).encode(request, None)
    *_, alone = denoise(load_denoiser(model), request, conditioning)
    for latents in run_ranks(len(EVERYONE), follow_schedule, checkpoint):
        assert np.abs(latents - alone.latents.numpy()).max() <= 1e-5


def test_every_plan_of_an_aligned_block_finds_its_groups() -> None:
    groups = aligned_groups(8)
    assert groups == sorted(set(groups))
    for ranks in ((0, 1), (6, 7), (4, 5, 6, 7), (0, 2, 4, 6), (1, 5), (3, 4, 5), tuple(range(8))):
        assert ranks in groups
    assert (1, 2) not in groups
