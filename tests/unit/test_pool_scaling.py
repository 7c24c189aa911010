"""How many replicas a pool is to have, by hand."""

import pytest

from autoscaling.demand import PoolDemand
from autoscaling.pool_scaling import PoolScaling, Reason, wanted_decoders, wanted_denoisers

CONFIG = PoolScaling(load=0.5, cold_start_s=100.0, keep_warm_s=600.0)


def wanted(demand: PoolDemand, ready: int = 0, *coming_s: float) -> tuple[int, Reason]:
    found = wanted_denoisers(demand, 8, ready, coming_s, CONFIG)
    return found.replicas, found.reason


def test_nobody_for_long_is_zero_and_nobody_for_a_while_is_one() -> None:
    assert wanted(PoolDemand(), 3) == (0, Reason.IDLE)
    assert wanted(PoolDemand(idle_s=600.0, per_s=9.0), 3) == (0, Reason.IDLE)
    assert wanted(PoolDemand(idle_s=599.0), 3) == (1, Reason.WARM)
    assert wanted(PoolDemand(queued_s=0.1), 0) == (1, Reason.OPEN)


def test_what_comes_needs_its_share_of_a_replica() -> None:
    """A replica of eight GPUs does four GPU-seconds a second of planned work."""
    assert wanted(PoolDemand(per_s=8.0, idle_s=0.0)) == (2, Reason.COMING)
    assert wanted(PoolDemand(per_s=8.1, idle_s=0.0)) == (3, Reason.COMING)


def test_what_is_usual_at_this_time_is_there_before_anyone_comes() -> None:
    assert wanted(PoolDemand(usual_per_s=8.0)) == (2, Reason.USUAL)


def test_what_is_due_counts_new_replicas_from_when_they_work() -> None:
    due = PoolDemand(queued_s=2400.0, due=((300.0, 2400.0),), idle_s=0.0)
    # two that work now would do; one new one does 4 x 200 until then
    assert wanted(due, 2) == (2, Reason.DUE)
    assert wanted(due, 0) == (3, Reason.DUE)
    assert wanted(due, 1) == (3, Reason.DUE)  # lacks 1200 of 2400
    assert wanted(due, 0, 0.0, 0.0) == (2, Reason.DUE)
    assert wanted(due, 0, 100.0, 100.0, 100.0) == (3, Reason.DUE)


def test_what_no_new_replica_can_help_asks_for_none() -> None:
    soon = PoolDemand(queued_s=4000.0, due=((50.0, 4000.0),), idle_s=0.0)
    assert wanted(soon, 2)[0] == 2
    assert wanted(soon, 0, 20.0)[0] == 1


def test_the_tightest_of_several_deadlines_counts() -> None:
    due = ((200.0, 100.0), (300.0, 2400.0), (10_000.0, 2500.0))
    assert wanted(PoolDemand(queued_s=2500.0, due=due, idle_s=0.0), 0)[0] == 3


@pytest.mark.parametrize("ready", [0, 1, 5])
def test_more_work_never_wants_fewer(ready: int) -> None:
    counts = [
        wanted(PoolDemand(queued_s=work_s, due=((400.0, work_s),), idle_s=0.0), ready)[0]
        for work_s in range(0, 40_000, 500)
    ]
    assert counts == sorted(counts)
    assert counts[-1] > 10


def test_decoders_keep_up_with_denoisers() -> None:
    demand = PoolDemand(decode_share=0.05)
    assert wanted_decoders(demand, 8, 0, CONFIG).replicas == 0
    assert wanted_decoders(demand, 8, 1, CONFIG).replicas == 1  # 0.4 s a second, of 0.5
    assert wanted_decoders(demand, 8, 3, CONFIG).replicas == 3
    assert wanted_decoders(PoolDemand(), 8, 1, CONFIG).replicas == 1


def test_every_answer_says_why() -> None:
    found = wanted_denoisers(
        PoolDemand(queued_s=2400.0, due=((300.0, 2400.0),), idle_s=0.0), 8, 0, (), CONFIG
    )
    assert found.why == "2400.0 GPU-seconds are due in 300 s"
