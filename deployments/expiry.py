"""Ends jobs that nobody finished: exactly once, whichever replicas look."""

import logging

from sqlalchemy import Engine

from credits.ledger import AlreadySettled
from credits.pricing import WorkWeights
from deployments.config import LeaseConfig
from deployments.settlement import WorkDone, expiry, settle
from jobs.leases import lease_overdue
from jobs.store import LeaseLost
from media.object_store import ObjectStore

logger = logging.getLogger("ray.serve")


def expire_jobs(
    engine: Engine, store: ObjectStore, weights: WorkWeights, leases: LeaseConfig, owner: str
) -> int:
    """End every job that is older than max_age_s and that nobody is at work on; how many.

    Each is leased before it is ended, so of several sweepers one ends it; one that is killed in
    between leaves it to the next after lease_s.
    """
    ended = 0
    while True:
        with engine.begin() as connection:
            job = lease_overdue(
                connection, owner, int(leases.max_age_s * 1000), int(leases.lease_s * 1000)
            )
        if job is None:
            return ended
        try:
            settle(engine, store, weights, job, lease_owner=owner, done=WorkDone(), ending=expiry())
        except (LeaseLost, AlreadySettled):
            continue  # another sweeper was quicker
        except OSError:  # after the COMMIT: the purger finds what is left
            logger.exception("job %s has expired, its files are left", job.id)
        ended += 1
