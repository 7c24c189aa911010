"""Which jobs a pipeline takes: of each tier as many as it has places, and whom it may help."""

from typing import Any

import pytest
from sqlalchemy import Engine, insert

from autoscaling.tiers import GpuTier
from deployments.config import LeaseConfig, TierConfig
from deployments.free_slots import FreeSlots
from jobs.job import JobId
from jobs.tables import jobs, now_ms

T4, A100 = GpuTier.T4, GpuTier.A100


def queue(engine: Engine, job_id: str, tier: GpuTier, **values: Any) -> None:
    """Without its money."""
    row = {
        "account_id": "any",
        "state": "queued",
        "model": "m",
        "priority": 0,
        "request": {},
        "quoted": 1,
        "quote_exact": "1",
        "reservation_id": job_id,
        "created_at_ms": now_ms(),
        "turn": 1,
    }
    with engine.begin() as connection:
        connection.execute(insert(jobs).values(id=job_id, tier=tier, **row | values))


def slots(engine: Engine, *tiers: TierConfig) -> FreeSlots:
    return FreeSlots(engine, "owner", list(tiers), LeaseConfig(), {A100: ["m"], T4: ["m"]})


def taken(slots: FreeSlots, **running: GpuTier) -> list[tuple[str, str]]:
    """What is taken beside these, and as whose of the tiers."""
    tier_of = {JobId(job_id): str(tier) for job_id, tier in running.items()}
    return [(job.id, job.tier) for job in slots.fill(tier_of)]


def test_each_tier_has_its_places_and_more_for_who_overtakes(engine: Engine) -> None:
    for number in range(3):
        queue(engine, f"t4 {number}", T4)
        queue(engine, f"a100 {number}", A100)
    tiers = [
        TierConfig(tier=T4, jobs_at_once=1, express_at_once=1),
        TierConfig(tier=A100, jobs_at_once=2),
    ]
    some = slots(engine, *tiers)
    assert taken(some) == [("t4 0", T4), ("a100 0", A100), ("a100 1", A100)]
    running = {"t4 0": T4, "a100 0": A100}
    queue(engine, "express", T4, priority=3)
    assert taken(some, **running) == [("express", T4), ("a100 2", A100)]


@pytest.mark.parametrize(
    ("values", "helps_after_s", "is_taken"),
    [({}, 0, True), ({}, 60, False), ({"model": "other"}, 0, False)],
)
def test_a_free_tier_takes_what_has_waited_for_another(
    engine: Engine, values: dict[str, Any], helps_after_s: float, is_taken: bool
) -> None:
    """Of its own models, and what it takes is its own from then on."""
    queue(engine, "waits", T4, **values)
    helping = TierConfig(tier=A100, jobs_at_once=1, helps=(T4,), helps_after_s=helps_after_s)
    assert taken(slots(engine, helping)) == ([("waits", A100)] if is_taken else [])


def test_its_own_jobs_come_first_and_its_places_are_all_that_it_lends(engine: Engine) -> None:
    queue(engine, "waits", T4)
    queue(engine, "own", A100)
    helping = TierConfig(tier=A100, jobs_at_once=1, express_at_once=1, helps=(T4,), helps_after_s=0)
    some = slots(engine, helping)
    assert taken(some) == [("own", A100)]
    assert taken(some, own=A100) == []  # the other place is for who overtakes
    assert taken(some) == [("waits", A100)]


def test_who_does_not_help_takes_nothing_of_others(engine: Engine) -> None:
    queue(engine, "waits", T4)
    assert taken(slots(engine, TierConfig(tier=A100, jobs_at_once=1))) == []
