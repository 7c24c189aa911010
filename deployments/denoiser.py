"""The stage that turns noise into latents, one step at a time, on a group of ranks."""

from collections.abc import AsyncIterator

from ray.util import get_current_placement_group

from deployments.checkpoints import Checkpoints
from deployments.config import TierConfig
from deployments.messages import Denoised, DenoiseWork
from deployments.rank_group import RankGroup
from deployments.step_loop import StepLoop
from media.object_store import ObjectStore
from models.catalog import Model
from models.tensors import Conditioning


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
        group = RankGroup(
            tier.tier, placement_group, models, tier.torch_threads, config.form_timeout_s
        )
        self.loop = StepLoop(group, Checkpoints(store, models), config)
        await self.loop.start()

    def check_health(self) -> None:
        """Fail, with the reason, if the ranks can't form a group any more."""
        self.loop.check_health()

    async def denoise(
        self, work: DenoiseWork, conditioning: Conditioning
    ) -> AsyncIterator[Denoised]:
        """Yield after each step; a cancelled call stops before the next one.

        The caller hands over a reference to the Conditioning, which Serve resolves here.
        """
        async for denoised in self.loop.denoise(work, conditioning):
            yield denoised
