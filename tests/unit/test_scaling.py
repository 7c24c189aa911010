"""What the pipeline tells of its pools."""

from dataclasses import replace
from pathlib import Path

import pytest

from autoscaling.demand import PoolDemand
from autoscaling.pool_scaling import Reason, Wanted
from autoscaling.tiers import GpuTier
from deployments.database import migrate, open_database
from deployments.scaling import Decision, Pool, Scaler


def test_what_was_wanted_before_is_not_told_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    migrate(engine)
    scaler = Scaler(engine, [], [])
    gauge: dict[tuple[str, ...], float] = {}
    monkeypatch.setattr(
        scaler.replicas, "set", lambda value, tags: gauge.__setitem__(tuple(tags.values()), value)
    )
    monkeypatch.setattr(scaler.gpu_seconds, "set", lambda *_: None)
    wanted = Wanted(3, Reason.DUE, "much is due")
    first = Decision("Denoiser-a100", GpuTier.A100, 1, 2, wanted, PoolDemand())
    for decision in (first, replace(first, wanted=Wanted(1, Reason.WARM, "somebody came"))):
        scaler.decisions = [decision]
        scaler._tell()
    told = {key[2]: value for key, value in gauge.items() if key[1] == "wanted" and value}
    assert told == {"warm": 1}
    assert gauge["Denoiser-a100", "ready", ""] == 1
    assert gauge["Denoiser-a100", "coming", ""] == 2
    engine.dispose()


def test_replicas_that_began_first_are_ready_first() -> None:
    pool = Pool()
    pool.count(0, 2, 0.0)
    pool.count(0, 3, 50.0)
    assert pool.coming_s(100.0, 60.0) == [40.0, 40.0, 90.0]
    pool.count(2, 1, 100.0)
    assert pool.coming_s(100.0, 110.0) == [40.0]
    pool.count(3, 0, 150.0)
    assert pool.coming_s(100.0, 150.0) == []
