"""Tells a replica that Serve is taking it away, while it still has requests."""

import asyncio

import ray

POLL_S = 0.1


def is_leaving() -> bool:
    """Whether Serve has begun to stop the replica that this process is.

    Serve 2.60 calls user code only when the last request has ended, which for a denoise may be
    much later than its node lives; the actor around the replica knows from the beginning.
    """
    worker = ray._private.worker.global_worker
    return bool(worker.actors[worker.actor_id]._replica_impl._shutting_down)


async def until_leaving() -> None:
    """Return as soon as it has begun."""
    while not is_leaving():
        await asyncio.sleep(POLL_S)
