"""Which jobs a pipeline takes next: as many of each tier as that may have at once."""

from collections.abc import Mapping

from sqlalchemy import Engine

from deployments.config import LeaseConfig, TierConfig
from jobs.job import Job, JobId
from jobs.leases import lease, lease_for


class FreeSlots:
    """The places of one pipeline. at_any_size: the models that each tier serves so."""

    def __init__(
        self,
        engine: Engine,
        owner: str,
        tiers: list[TierConfig],
        leases: LeaseConfig,
        at_any_size: Mapping[str, list[str]],
    ) -> None:
        self.engine = engine
        self.owner = owner
        self.tiers = tiers
        self.lease_ms = int(leases.lease_s * 1000)
        self.ageing_ms = int(leases.ageing_s * 1000)
        self.at_any_size = at_any_size

    def fill(self, tier_of: Mapping[JobId, str]) -> list[Job]:
        """Lease a job for every place that is free. tier_of: of the jobs that have one."""
        running = dict(tier_of)
        leased: list[Job] = []
        for tier in self.tiers:
            most = tier.jobs_at_once + tier.express_at_once
            for number in range(list(running.values()).count(tier.tier), most):
                # A step scheduler can let overtake only whom it knows of.
                is_express = number >= tier.jobs_at_once
                job = self._lease(tier, running, is_express=is_express)
                if job is None and not is_express:
                    job = self._lease_of_helped(tier)
                if job is None:
                    break
                leased.append(job)
        return leased

    def _lease(
        self, tier: TierConfig, running: Mapping[JobId, str], *, is_express: bool
    ) -> Job | None:
        with self.engine.begin() as connection:
            return lease(
                connection,
                self.owner,
                [tier.tier],
                self.lease_ms,
                set(running),
                self.ageing_ms,
                tier.denoiser.urgency.express_priority if is_express else 0,
            )

    def _lease_of_helped(self, tier: TierConfig) -> Job | None:
        """A job that has waited for its own tier for long, and is this one's from now on."""
        if not tier.helps:
            return None
        with self.engine.begin() as connection:
            return lease_for(
                connection,
                self.owner,
                tier.tier,
                of_tiers=tier.helps,
                models=self.at_any_size[tier.tier],
                min_wait_ms=int(tier.helps_after_s * 1000),
                lease_ms=self.lease_ms,
            )
