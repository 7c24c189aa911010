"""What every pipeline replica does now and then, whichever jobs it runs."""

import asyncio
import functools
import itertools
import logging

from sqlalchemy import Engine

from credits.pricing import WorkWeights
from deployments.config import LeaseConfig
from deployments.database import when_back
from deployments.expiry import expire_jobs
from deployments.purge import Purger
from media.object_store import ObjectStore

logger = logging.getLogger("ray.serve")

SWEEP_S = 1.0
SELDOM = 60


class Sweeper:
    """Ends jobs that nobody finishes, deletes videos that are kept no longer, and files."""

    def __init__(
        self,
        engine: Engine,
        store: ObjectStore,
        weights: WorkWeights,
        leases: LeaseConfig,
        owner: str,
    ) -> None:
        self.purger = Purger(engine, store)
        self.expire = functools.partial(expire_jobs, engine, store, weights, leases, owner)

    async def run(self) -> None:
        """For ever: what owners wait for in every round, the rest in every SELDOM-th."""
        for round_number in itertools.count():
            try:
                await when_back(self.purger.delete_expired)
                await when_back(self.purger.purge_videos)
                if round_number % SELDOM == 0:
                    if ended := await when_back(self.expire):
                        logger.warning("%d jobs expired", ended)
                    await when_back(self.purger.purge_orphans)
                    await when_back(self.purger.purge_unpublished)
                    await when_back(self.purger.purge_unfinished)
            except OSError:  # a folder that can't be read now is read by another round
                logger.exception("the sweep is not done")
            await asyncio.sleep(SWEEP_S)
