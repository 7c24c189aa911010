"""Nodes that come and go: what they cost, what becomes of their requests, and the gate."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from autoscaling.demand import measure_demand
from autoscaling.pool_scaling import wanted_denoisers
from autoscaling.simulated_cluster import ClusterConfig, Fleet, History, Job, NodeStart
from autoscaling.simulated_scaling import NODE, ByDemandScaling, KindCosts, ServeDelays
from autoscaling.simulator import GuaranteedSet, Simulator
from autoscaling.workloads import (
    ANIMATEDIFF,
    DAY_S,
    KINDS,
    LARGE_MIX,
    SMALL_MIX,
    Asked,
    mean_work_s,
    mix_of_day,
    poisson,
    requests,
    varying,
    work_of_day,
)
from bench.published_scalers import DisagFusion, Keda, RayServe, Static
from bench.scaled_days import DAYS, DOWN_S, POOL, URGENCY, simulate_day
from credits.plans import Plan
from jobs.demand import JobGroup
from models.cost import VideoShape

LONG = KINDS[4]


@dataclass
class Script:
    """So many nodes from these moments on."""

    counts: Sequence[tuple[float, int]]
    asked: list[tuple[float, int, int]] = field(default_factory=list)

    def nodes(self, fleet: Fleet) -> int:
        self.asked.append((fleet.now_s, fleet.ready, len(fleet.coming_s)))
        return [count for moment_s, count in self.counts if moment_s <= fleet.now_s][-1]


def run(script: Script, asked: Sequence[Asked], **changes: object) -> History:
    config = replace(ClusterConfig(num_nodes=1, slots=16), **changes)  # type: ignore[arg-type]
    return Simulator(config, GuaranteedSet, scaling=script).run(asked)


def at(*moments_s: float) -> list[Asked]:
    return [Asked(moment_s, LONG, Plan.BASIC, number) for number, moment_s in enumerate(moments_s)]


def test_a_node_works_after_its_start_and_is_paid_for_from_when_it_was_asked_for() -> None:
    assert NodeStart().total_s == 360.0
    script = Script([(0.0, 2), (500.0, 1)])
    history = run(script, at(0.0, 1.0, 900.0))
    states = {moment_s: (ready, coming) for moment_s, ready, coming in script.asked}
    assert states[350.0] == (1, 1)
    assert states[370.0] == (2, 0)
    assert states[510.0] == (1, 0)
    assert history.node_s == pytest.approx(history.end_s + 500.0, abs=LONG.measured_s[1])


def test_a_node_that_goes_hands_its_requests_over_and_none_is_lost() -> None:
    script = Script([(0.0, 3), (600.0, 1)])
    history = run(script, at(*(10.0 * number for number in range(90))), num_nodes=3)
    assert all(job.finished_s is not None for job in history.jobs)
    assert sum(job.lost_steps for job in history.jobs) == 0


def test_a_node_that_is_not_there_yet_goes_first() -> None:
    script = Script([(0.0, 2), (100.0, 1)])
    history = run(script, at(0.0, 400.0))
    assert {(ready, coming) for moment_s, ready, coming in script.asked if moment_s > 100} == {
        (1, 0)
    }
    assert history.node_s == pytest.approx(history.end_s + 100.0)


def test_who_finds_no_slot_waits_in_the_queues_order() -> None:
    """Of two accounts that wait the one takes its turn that has nothing running."""
    asked = [Asked(float(n), ANIMATEDIFF, Plan.BASIC, 0) for n in range(4)]
    asked.append(Asked(4.0, ANIMATEDIFF, Plan.BASIC, 1))
    asked.append(Asked(5.0, ANIMATEDIFF, Plan.ENTERPRISE, 2))
    history = run(Script([(0.0, 1)]), asked, slots=1, gpus_per_node=1)
    order = sorted(history.jobs, key=lambda job: job.finished_s or 0.0)
    assert [job.asked.account for job in order] == [0, 2, 1, 0, 0, 0]


def test_ours_are_the_live_functions() -> None:
    """What the job table would say of the simulated jobs, and what the live rules make of it."""
    rng = random.Random(1)
    asked = list(itertools.islice(requests(poisson(rng, 0.5), rng), 60))
    compared: list[int] = []

    def group(job: Job, left: float, fleet: Fleet) -> JobGroup:
        kind = job.asked.kind
        shape = VideoShape(kind.num_frames, kind.width, kind.height, 1, guided=True)
        age_s = fleet.now_s - job.asked.arrived_s
        age_s -= age_s % (10 if age_s < 600 else 60)
        like = ("a100", kind.name, str(shape), None, 1, False, age_s)
        return JobGroup(*like, num_jobs=1, num_steps=kind.num_steps, left=left)

    class Watched:
        def nodes(self, fleet: Fleet) -> int:
            steps = [(job, job.task.steps_left) for job in fleet.open_jobs]
            still = [group(j, left / j.asked.kind.num_steps, fleet) for j, left in steps]
            came = [
                group(j, 1.0, fleet) for j in fleet.jobs if fleet.now_s - j.asked.arrived_s < 2700
            ]
            demand = measure_demand(NODE, still, came, [], KindCosts(), URGENCY, POOL.horizon)
            live = wanted_denoisers(demand, 8, fleet.ready, fleet.coming_s, POOL)
            wanted = ByDemandScaling(URGENCY, POOL).wanted(fleet)
            assert (wanted.replicas, wanted.reason) == (live.replicas, live.reason)
            compared.append(live.replicas)
            return max(1, live.replicas)

    Simulator(ClusterConfig(slots=16), GuaranteedSet, scaling=Watched()).run(asked)
    assert max(compared) > 2
    assert len(compared) > 30


def fleet(now_s: float, ready: int, open_jobs: int, utilisation: float = 0.5) -> Fleet:
    jobs: list[None] = [None] * open_jobs
    return Fleet(now_s, ready, (), [], jobs, jobs[16 * ready :], utilisation)  # type: ignore[arg-type]


def test_rays_default_takes_a_replica_for_two_requests_after_its_delay() -> None:
    ray = RayServe(2.0)
    found = [ray.nodes(fleet(float(s), 1, 10)) for s in range(0, 50, 10)]
    assert found[:4] == [1, 1, 1, 5]
    assert RayServe(2.0).nodes(fleet(0.0, 0, 9)) == 1


def test_kedas_scaler_lowers_to_the_most_of_five_minutes() -> None:
    keda = Keda(4.0)
    assert keda.nodes(fleet(0.0, 1, 40)) == 10
    assert keda.nodes(fleet(200.0, 10, 4)) == 10
    assert keda.nodes(fleet(400.0, 10, 4)) == 1


def test_disagfusion_takes_one_at_a_time() -> None:
    disag = DisagFusion()
    assert disag.nodes(fleet(0.0, 4, 64, 0.9)) == 5
    assert disag.nodes(fleet(10.0, 5, 64, 0.9)) == 5  # it waits for 30 s
    assert disag.nodes(fleet(40.0, 5, 8, 0.1)) == 4
    assert Static(8).nodes(fleet(0.0, 1, 0)) == 8


def test_serves_delays_are_serves() -> None:
    delays = ServeDelays(up_s=0.0, down_s=60.0)
    assert delays.apply(4, 1, 0.0) == 4
    assert [delays.apply(1, 4, float(s)) for s in (0, 30, 59)] == [4, 4, 4]
    assert delays.apply(1, 4, 60.0) == 1


def test_a_day_has_its_shape() -> None:
    assert work_of_day(0.0, 10.0) == pytest.approx(3.0)
    assert work_of_day(DAY_S / 2, 10.0) == pytest.approx(17.0)
    assert (mix_of_day(0.0), mix_of_day(10_800.0)) == (SMALL_MIX, LARGE_MIX)
    rng = random.Random(0)
    arrivals = list(
        itertools.takewhile(
            lambda moment_s: moment_s < DAY_S,
            varying(rng, lambda moment_s: work_of_day(moment_s, 0.1), 0.17),
        )
    )
    assert len(arrivals) == pytest.approx(0.1 * DAY_S, rel=0.05)
    noon = sum(DAY_S * 0.45 < moment_s < DAY_S * 0.55 for moment_s in arrivals)
    night = sum(moment_s < DAY_S * 0.1 for moment_s in arrivals)
    assert noon > 4 * night
    asked = DAYS["W3-shift"].requests(0, hours=6.0)
    early = [one for one in asked if one.arrived_s < 10_800]
    late = [one for one in asked if one.arrived_s >= 10_800]
    ratio = sum(one.kind.work_s for one in late) / sum(one.kind.work_s for one in early)
    assert 1.2 < ratio < 2.8  # the work grows with the day, the number of requests falls
    assert len(early) > 5 * len(late)
    assert mean_work_s(LARGE_MIX) > 10 * mean_work_s(SMALL_MIX)


def test_the_gate() -> None:
    """What takes more nodes than this, or is late more often, does not land."""
    ours = simulate_day("W3-shift", "by-demand", 0, hours=4.0)
    theirs = simulate_day("W3-shift", "ray-default-2", 0, hours=4.0)
    assert ours["attainment"] >= 0.97
    assert ours["over_bound"] <= 1.9
    assert ours["node_hours"] <= 0.8 * theirs["node_hours"]
    # rules that forget how long a node takes to come are late
    hopeful = POOL.model_copy(update={"cold_start_s": 0.0, "load": 1.0})
    other = {"x": lambda: ByDemandScaling(URGENCY, hopeful, delays=ServeDelays(0.0, DOWN_S))}
    assert simulate_day("W3-shift", "x", 0, 4.0, other)["attainment"] < 0.97
