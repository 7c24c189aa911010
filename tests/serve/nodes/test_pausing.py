"""A long step of one model that pauses for another's, inside of a running denoiser."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from autoscaling.rank_blocks import Block
from autoscaling.step_scheduler import StepSchedulerConfig
from deployments.checkpoints import Checkpoints
from deployments.config import DenoiserConfig
from deployments.held import HandedOver
from deployments.messages import Denoised, DenoiseWork
from deployments.rank_group import RankGroup
from deployments.step_loop import StepLoop
from jobs.store import LeaseLost
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model
from models.memory import OutOfMemory
from models.request import VideoRequest
from models.stages import load_encoder

pytestmark = [pytest.mark.serve, pytest.mark.long]

Latents = NDArray[np.float32]
Told = Callable[[Denoised], Awaitable[None] | None]
NUM_STEPS = 5
# Between what a step of the two takes.
SECTION_S = 0.1


class Work:
    """A request that can be made several times."""

    def __init__(self, model: Model, priority: int, **fields: Any) -> None:
        self.request: VideoRequest = model.resolve({"prompt": "x", "seed": 1, **fields})
        self.conditioning = load_encoder(model).encode(self.request, None)
        self.priority = priority

    async def run(
        self, loop: StepLoop, job_id: str, told: Told = lambda _: None, lease: int = 1
    ) -> Latents:
        """Its latents; told is called after each step."""
        work = DenoiseWork(job_id, self.priority, 0.0, self.request, lease=lease)
        moment: Denoised | None = None
        async for moment in loop.denoise(work, self.conditioning):
            if (act := told(moment)) is not None:
                await act
        assert moment is not None
        return np.asarray(await moment.latents)  # type: ignore[misc]


@pytest.fixture(scope="module")
def other(random_family: Callable[[str], Any]) -> Model:
    return load_model(random_family("animatediff"))


@pytest.fixture(scope="module")
def long(other: Model) -> Work:
    return Work(other, 0, num_steps=NUM_STEPS, num_frames=16, width=256, height=256)


@pytest.fixture(scope="module")
def short(model: Model) -> Work:
    return Work(model, 3, num_steps=3, num_frames=5, width=64, height=64, guidance_scale=1.0)


@asynccontextmanager
async def running(
    store: LocalObjectStore, *models: Model, section_s: float = SECTION_S
) -> AsyncIterator[StepLoop]:
    """A loop with two ranks, which knows how long the steps of both models take."""
    bundles = placement_group([{"CPU": 0.01}, {"CPU": 0.02}, {"CPU": 0.02}])
    await bundles.ready()
    config = DenoiserConfig(
        degrees=(2,), checkpoint_s=1e6, scheduler=StepSchedulerConfig(section_s=section_s)
    )
    group = RankGroup("pausing", bundles, 1, form_timeout_s=200.0)
    loop = StepLoop(group, Checkpoints(store, list(models)), config, lambda _: None)
    try:
        await loop.start()
        for model in models:
            await loop.load(model)
        yield loop
    finally:
        group.end()
        remove_placement_group(bundles)


def test_another_models_steps_are_made_within_one(
    nodes: Cluster, store: LocalObjectStore, model: Model, other: Model, long: Work, short: Work
) -> None:
    async def act() -> None:
        async with running(store, model, other, section_s=1e6) as loop:
            expected = [await long.run(loop, "long"), await short.run(loop, "short")]
        async with running(store, model, other) as loop:
            await long.run(loop, "times"), await short.run(loop, "times too")
            assert loop.num_overtakings == 0
            ended: list[asyncio.Task[Latents]] = []

            def begin(moment: Denoised) -> None:
                if moment.step in (2, 3):
                    job_id = f"short {moment.step}"
                    ended.append(asyncio.create_task(short.run(loop, job_id)))

            found = await long.run(loop, "long", begin)
            assert np.array_equal(found, expected[0])
            for task in ended:
                assert np.array_equal(await task, expected[1])
            assert loop.num_overtakings >= 1
            assert loop.held == {}
            assert loop.group.generation == 1  # no rank was asked for what it can't do

    asyncio.run(within(300, act()))


def test_who_lacks_memory_beside_a_paused_step_is_tried_without_it(
    nodes: Cluster, store: LocalObjectStore, model: Model, other: Model, long: Work
) -> None:
    """And fails if there is none to be had so; what stood is made again. The lack is told to the
    loop by the test: what is too large for a rank is no short step here.
    """
    many = Work(model, 3, num_steps=200, num_frames=5, width=64, height=64, guidance_scale=1.0)

    async def act() -> None:
        async with running(store, model, other) as loop:
            expected = await long.run(loop, "times")
            standing = asyncio.create_task(long.run(loop, "standing"))
            await until_paused(loop)
            beside = asyncio.create_task(many.run(loop, "beside"))
            while loop.num_overtakings == 0:
                await asyncio.sleep(0.002)
            (stands,) = [held for held in loop.held.values() if held.paused]
            (lacks,) = [held for held in loop.held.values() if held.id in loop.under_way]
            error = OutOfMemory(model.id, "no room")
            loop._lack([lacks], Block(0, 2), error)
            assert not lacks.failed
            assert stands.paused is None
            loop._lack([lacks], Block(0, 2), error)
            with pytest.raises(OutOfMemory, match="no room"):
                await beside
            assert np.array_equal(await standing, expected)
            assert loop.group.generation == 1

    asyncio.run(within(300, act()))


async def within(seconds: float, act: Awaitable[None]) -> None:
    async with asyncio.timeout(seconds):
        await act


async def until_paused(loop: StepLoop) -> None:
    async with asyncio.timeout(30):
        while not any(held.paused for held in loop.held.values()):
            await asyncio.sleep(0.002)


def test_whoever_leaves_or_breaks_a_paused_step_costs_it_alone(
    nodes: Cluster, store: LocalObjectStore, model: Model, other: Model, long: Work, short: Work
) -> None:
    """Cancelled, or of a lease that is lost, its ranks are free; a model that is loaded meanwhile
    does not touch it; after a rank's death it is made again, to the same bits; and a replica that
    goes makes it to its end.
    """

    async def act() -> None:
        async with running(store, model, other) as loop:
            expected = await long.run(loop, "times")
            left = asyncio.create_task(long.run(loop, "left"))
            await until_paused(loop)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            assert np.array_equal(await long.run(loop, "next"), expected)

            lost = asyncio.create_task(long.run(loop, "leased"))
            await until_paused(loop)
            assert np.array_equal(await long.run(loop, "leased", lease=2), expected)
            with pytest.raises(LeaseLost):
                await lost

            loading = asyncio.create_task(long.run(loop, "loading"))
            await until_paused(loop)
            await loop.load(replace(model, id="one more"))
            assert np.array_equal(await loading, expected)
            assert loop.group.generation == 1

            broken = asyncio.create_task(long.run(loop, "broken"))
            await until_paused(loop)
            os.kill(loop.group.seats[1].pid, signal.SIGKILL)
            assert np.array_equal(await broken, expected)
            assert loop.group.generation == 2

            steps: list[int] = []
            going = asyncio.create_task(
                long.run(loop, "going", lambda moment: steps.append(moment.step))
            )
            await until_paused(loop)
            made = loop.num_made
            await loop.hand_over()
            with pytest.raises(HandedOver):
                await going
            assert loop.num_made == made + 1
            saved = await loop.checkpoints.find("going", long.request)
            assert saved is not None
            assert saved.state.step == steps[-1] > 0

    asyncio.run(within(300, act()))
