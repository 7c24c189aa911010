"""The stage that turns noise into latents, one step at a time, on a group of ranks."""

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any

from ray.util import get_current_placement_group

from deployments.checkpoints import Checkpoints
from deployments.config import TierConfig
from deployments.leaving import is_leaving, until_leaving
from deployments.messages import Denoised, DenoiseWork
from deployments.rank_group import RankGroup
from deployments.resident_models import ResidentModels
from deployments.step_loop import StepLoop
from deployments.tier_room import rooms_of
from media.object_store import ObjectStore
from models.catalog import Model
from models.conditioning import Conditioning
from models.fetch import fetch_parts
from models.request import VideoRequest


class Denoiser:
    """Owns a placement group: one bundle for itself, which needs no GPU, and one for each rank.

    It takes as many requests as max_ongoing_requests says; who of them runs is for the step
    scheduler to say.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, models: list[Model], store: ObjectStore, tier: TierConfig
    ) -> None:
        placement_group = get_current_placement_group()
        if placement_group is None:
            raise ValueError("a denoiser needs placement_group_bundles, its own and each rank's")
        config = tier.denoiser
        group = RankGroup(tier.tier, placement_group, tier.torch_threads, config.form_timeout_s)
        self.jobs: list[str] = []
        if tier.gpu is not None and tier.gpu.count != group.size:
            raise ValueError(
                f"tiers[].gpu.count is {tier.gpu.count} for {tier.tier}, whose placement group has "
                f"{group.size} ranks"
            )
        by_id, rooms = {model.id: model for model in models}, rooms_of(tier, models)

        def degrees_for(request: VideoRequest) -> Collection[int] | None:
            room = rooms.get(request.model)
            return None if room is None else room.degrees_for(by_id[request.model], request)

        for model in models:  # what they take of memory is read from their files
            await asyncio.to_thread(fetch_parts, model)
        self.loop = StepLoop(group, Checkpoints(store, models), config, degrees_for)
        await self.loop.start()
        self.models = ResidentModels(self.loop, models, config.model_memory_bytes)
        self.load_model = self.models.load  # where Serve looks for what is multiplexed
        await self.models.preload()
        assert not is_leaving()
        self.leaving = asyncio.create_task(self._hand_over_when_leaving())

    async def _hand_over_when_leaving(self) -> None:
        await until_leaving()
        await self.loop.hand_over()

    def check_health(self) -> None:
        """Fail, with the reason, if the ranks can't form a group any more."""
        self.loop.check_health()
        if self.leaving.done():
            self.leaving.result()

    def describe(self) -> dict[str, Any]:
        """What it holds now: the group's generation, its ranks' seats and models, and the jobs that
        are here, those that wait for their model among them, with the ranks of their last steps;
        how many steps it has made, one shared by several requests counted once, and how many of
        them began while another had paused on their ranks.
        """
        group = self.loop.group
        return {
            "generation": group.generation,
            "ranks": [{"node": seat.node, "pid": seat.pid} for seat in group.seats],
            "models": sorted(group.models),
            "steps_made": self.loop.num_made,
            "overtakings": self.loop.num_overtakings,
            "jobs": list(self.jobs),
            "blocks": {
                held.work.job_id: list(held.block.ranks)
                for held in self.loop.held.values()
                if held.block is not None
            },
        }

    async def denoise(
        self, work: DenoiseWork, conditioning: Conditioning
    ) -> AsyncIterator[Denoised]:
        """Yield after each step; a cancelled call stops before the next one.

        The caller hands over a reference to the Conditioning, which Serve resolves here.
        """
        self.jobs.append(work.job_id)
        try:
            await self.loop.ready.wait()
            async with self.models.use(work.request.model):
                async for denoised in self.loop.denoise(work, conditioning):
                    yield denoised
        finally:
            self.jobs.remove(work.job_id)
