"""The simulated cluster's laws, and the gate that the step scheduler must pass to land."""

import functools
import itertools
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from fractions import Fraction

import pytest

from autoscaling.simulated_cluster import ClusterConfig, Hang, History, Reclaim, StepPolicy
from autoscaling.simulator import GuaranteedSet, Simulator, step_seconds
from autoscaling.step_scheduler import StepSchedulerConfig, next_steps
from autoscaling.tasks import Step, Task
from autoscaling.workloads import (
    ANIMATEDIFF,
    KINDS,
    MIX,
    PLANS,
    SVD_XT,
    Asked,
    bursts,
    mean_work_s,
    poisson,
    requests,
)
from bench.node_runs import (
    IN_TRIAL,
    POLICIES,
    TRIAL_POINTS,
    TRIAL_SEEDS,
    WORKLOADS,
    cluster_for,
    counted,
    plan_weight,
    reproduced,
    share_in_time,
)
from credits.plans import Plan
from credits.pricing import quote


class Recorded:
    """The policy of a node, whose steps are kept for the test."""

    def __init__(self, policy: StepPolicy) -> None:
        self.policy = policy
        self.begun: list[tuple[float, Step]] = []

    def next_steps(
        self, now_s: float, num_ranks: int, tasks: Collection[Task], under_way: Sequence[Step]
    ) -> list[Step]:
        steps = self.policy.next_steps(now_s, num_ranks, tasks, under_way)
        self.begun += [(now_s, step) for step in steps]
        return steps


def assert_every_step_is_made(recorded: Recorded, history: History) -> None:
    """Once, all sections of it."""
    made: defaultdict[str, Fraction] = defaultdict(Fraction)
    for _, step in recorded.begun:
        made[step.task_id] += Fraction(1, step.sections)
    assert all(made[job.task.id] == job.asked.kind.num_steps for job in history.jobs)


def some(seed: int, count: int, *, load: float = 0.7) -> list[Asked]:
    rng = random.Random(seed)
    arrivals = poisson(rng, load * 8 / mean_work_s())
    return list(itertools.islice(requests(arrivals, rng, plans=PLANS), count))


def facts(history: History) -> list[tuple[float | None, float, int]]:
    return [(job.finished_s, job.gpu_s, job.num_moves) for job in history.jobs]


@pytest.mark.parametrize("name", [None, *POLICIES])
def test_every_request_makes_its_steps_on_ranks_of_its_own(name: str | None) -> None:
    """Whatever the policy; a policy that gave a rank away twice would look better than it is."""
    recorded = Recorded(GuaranteedSet() if name is None else POLICIES[name]())
    history = Simulator(ClusterConfig(switch_s=0.0), lambda: recorded).run(some(1, 120))
    assert_every_step_is_made(recorded, history)
    taken: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for began_s, step in recorded.begun:
        assert step.block.first % step.block.size == 0
        for rank in step.block.ranks:
            taken[rank].append((began_s, step.ends_s))
    assert set(taken) == set(range(8))
    for spans in taken.values():
        assert all(
            before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(sorted(spans))
        )
    gpu_s = sum((step.ends_s - began_s) * step.block.size for began_s, step in recorded.begun)
    assert history.busy_s == pytest.approx(gpu_s)
    assert history.busy_s >= sum(job.asked.kind.work_s for job in history.jobs) - 1e-6


def test_ours_is_the_live_function() -> None:
    tasks = [Task(str(n), 0.0, 99.0, math.inf, 5, {1: 1.0, 2: 0.6}) for n in range(3)]
    config = StepSchedulerConfig(hurry=0.9)
    assert GuaranteedSet(config).next_steps(0.0, 2, tasks, []) == next_steps(
        0.0, 2, tasks, [], config
    )


def test_times_by_hand() -> None:
    """Two short videos and a third, one GPU each, of two: the third waits for the first's end."""
    config = ClusterConfig(gpus_per_node=2)
    asked = [Asked(float(n), ANIMATEDIFF, Plan.BASIC, n) for n in range(3)]
    history = Simulator(config, POLICIES["fifo-1"]).run(asked)
    length_s = ANIMATEDIFF.work_s
    ends_s = [length_s, 1 + length_s, 2 * length_s]
    assert [job.finished_s for job in history.jobs] == pytest.approx(ends_s)
    assert history.waste_s == 0.0
    assert history.end_s == pytest.approx(2 * length_s)


def test_a_policy_that_lets_gpus_idle_while_somebody_waits_is_seen() -> None:
    asked = [Asked(0.0, ANIMATEDIFF, Plan.BASIC, 0), Asked(0.0, SVD_XT, Plan.BASIC, 0)]
    history = Simulator(ClusterConfig(gpus_per_node=8), POLICIES["best-degree-fifo"]).run(asked)
    assert history.waste_s == 0.0
    three = [*asked, Asked(0.0, KINDS[3], Plan.BASIC, 0)]  # wants all 8, and waits for them
    history = Simulator(ClusterConfig(gpus_per_node=8), POLICIES["best-degree-fifo"]).run(three)
    alone_s = SVD_XT.measured_s[4] * 25 - ANIMATEDIFF.measured_s[4] * 25
    assert history.waste_s == pytest.approx(4 * alone_s)


def test_the_same_seed_ends_alike_and_another_does_not() -> None:
    config = ClusterConfig(num_nodes=3, cost_error=0.1)
    runs = [
        facts(Simulator(config, GuaranteedSet, seed=seed).run(some(4, 100, load=2.0)))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    other = facts(Simulator(config, GuaranteedSet, seed=1).run(some(5, 100, load=2.0)))
    assert other != runs[0]


def test_steps_take_what_was_measured_at_degrees_that_there_are() -> None:
    for kind in KINDS:
        assert step_seconds(kind, 8) == kind.measured_s
    assert set(step_seconds(KINDS[-1], 2)) == {1, 2}


def test_a_change_of_ranks_costs_time() -> None:
    asked = some(3, 150, load=0.9)
    free, dear = (
        Simulator(ClusterConfig(switch_s=switch_s), GuaranteedSet).run(asked)
        for switch_s in (0.0, 1.0)
    )
    assert sum(job.num_moves for job in free.jobs) > 100
    assert statistics.mean(j.latency_s for j in dear.jobs) > statistics.mean(
        j.latency_s for j in free.jobs
    )


def reclaimed(notice_s: float) -> History:
    reclaims = tuple(Reclaim(node, 150.0 + 100 * node, notice_s) for node in range(3))
    config = ClusterConfig(num_nodes=5, reclaims=reclaims)
    return Simulator(config, GuaranteedSet).run(some(6, 150, load=3.0))


def test_a_node_that_is_told_to_leave_loses_nothing() -> None:
    history = reclaimed(120.0)
    assert all(job.finished_s is not None for job in history.jobs)
    assert sum(job.lost_steps for job in history.jobs) == 0


def test_notice_that_is_shorter_than_a_step_loses_that_step() -> None:
    history = reclaimed(0.2)
    lost = [job.lost_steps for job in history.jobs if job.lost_steps]
    assert lost
    assert max(lost) == 1


def test_a_node_that_dies_loses_what_was_made_since_the_checkpoint() -> None:
    history = reclaimed(0.0)
    lost = [job for job in history.jobs if job.lost_steps]
    assert max(job.lost_steps for job in lost) > 1
    for job in lost:  # what fits into 30 s, the step that passed them and the one under way
        assert job.lost_steps <= 30.0 / job.task.quickest_s + 2
    assert all(job.finished_s is not None for job in history.jobs)
    dead = replace(ClusterConfig(), reclaims=(Reclaim(0, 50.0, 0.0),))
    left = Simulator(dead, GuaranteedSet).run(some(6, 40))
    assert any(job.finished_s is None for job in left.jobs)  # nothing is left to run them


@pytest.mark.parametrize("at_s", [50.0, 1e6])
def test_a_hang_costs_the_steps_under_way_and_the_time_to_form_again(at_s: float) -> None:
    """If there is a step at all."""
    config = ClusterConfig(gpus_per_node=1, switch_s=0.0)
    long = [Asked(0.0, KINDS[3], Plan.BASIC, 0)]
    (undisturbed,) = Simulator(config, GuaranteedSet).run(long).jobs
    hung = replace(config, hangs=(Hang(0, at_s),))
    (job,) = Simulator(hung, GuaranteedSet).run(long).jobs
    assert undisturbed.finished_s is not None
    assert job.finished_s is not None
    if at_s > undisturbed.finished_s:
        assert (job.finished_s, job.lost_steps) == (undisturbed.finished_s, 0)
        return
    step_s = KINDS[3].measured_s[1]
    assert job.lost_steps == 1
    # its last boundary, from which it goes on, is less than a step before
    late_s = config.hang_factor * step_s + config.form_s
    assert late_s <= job.finished_s - undisturbed.finished_s <= late_s + step_s + 1e-6


def test_a_hang_while_its_node_is_told_to_go_loses_nothing_else() -> None:
    asked = some(6, 60, load=2.0)
    config = ClusterConfig(num_nodes=2, reclaims=(Reclaim(0, 150.0),), hangs=(Hang(0, 29.0),))
    history = Simulator(config, GuaranteedSet).run(asked)
    assert all(job.finished_s is not None for job in history.jobs)
    assert 1 <= max(job.lost_steps for job in history.jobs) <= 2


def test_what_is_charged_is_the_live_price_of_what_was_done() -> None:
    config = ClusterConfig(reclaims=(Reclaim(0, 100.0, 0.0),))
    jobs = Simulator(config, GuaranteedSet).run(some(6, 60, load=3.0)).jobs
    for job in jobs:
        kind = job.asked.kind
        price = quote(
            config.prices,
            kind.family,
            num_frames=kind.num_frames,
            width=kind.width,
            height=kind.height,
        ).credits
        if job.finished_s is None:
            assert 0 <= job.charged(config.prices) < price
        else:
            assert job.charged(config.prices) == price
    assert {job.finished_s is None for job in jobs} == {True, False}
    assert any(job.charged(config.prices) > 0 for job in jobs if job.finished_s is None)


def test_steps_that_take_longer_than_expected_are_still_made_once() -> None:
    config = ClusterConfig(cost_error=0.5, switch_s=0.0)
    recorded = Recorded(GuaranteedSet())
    history = Simulator(config, lambda: recorded).run(some(7, 120))
    assert_every_step_is_made(recorded, history)
    assert (
        min(job.slowness for job in history.jobs)
        < 0.7
        < 1.3
        < max(job.slowness for job in history.jobs)
    )


def gaps(arrivals: Sequence[float]) -> float:
    """The coefficient of variation of the time between two."""
    between = [after - before for before, after in itertools.pairwise(arrivals)]
    return statistics.stdev(between) / statistics.mean(between)


def test_arrivals_have_their_rate_and_bursts_are_bursts() -> None:
    def first(make: Callable[..., object], **options: float) -> list[float]:
        process = make(random.Random(0), 0.5, **options)
        return list(itertools.islice(process, 60_000))  # type: ignore[call-overload]

    steady, bursty = first(poisson), first(bursts, mean_s=18.0)
    for arrivals in (steady, bursty):
        assert len(arrivals) / arrivals[-1] == pytest.approx(0.5, rel=0.08)
    assert gaps(steady) == pytest.approx(1.0, abs=0.03)
    assert gaps(bursty) > 1.4
    counts = [Counter(int(moment / 18) for moment in arrivals) for arrivals in (steady, bursty)]
    dispersion = [
        statistics.variance(count.values()) / statistics.mean(count.values()) for count in counts
    ]
    assert dispersion[0] < 1.1
    assert dispersion[1] > 5


def test_kinds_plans_and_accounts_have_their_shares() -> None:
    rng = random.Random(2)
    asked = list(itertools.islice(requests(poisson(rng, 1.0), rng, plans=PLANS), 20_000))
    kinds = Counter(one.kind.name for one in asked)
    for kind, share in zip(KINDS, MIX, strict=True):
        assert kinds[kind.name] / 20_000 == pytest.approx(share, abs=0.01)
    plans = Counter(one.plan for one in asked)
    assert {plan: plans[plan] / 20_000 for plan in PLANS} == pytest.approx(PLANS, abs=0.015)
    users = Counter(one.account for one in asked).most_common()
    assert users[0][1] > 10 * statistics.median(count for _, count in users)


@pytest.mark.long
@pytest.mark.parametrize("policy", IN_TRIAL)
def test_published_schedulers_do_as_in_the_trial(policy: str) -> None:
    shares = [reproduced(policy, seed) for seed in TRIAL_SEEDS]
    assert statistics.mean(shares) == pytest.approx(IN_TRIAL[policy], abs=TRIAL_POINTS)


@pytest.mark.parametrize(
    ("workload", "least", "more_than_srtf"),
    [("W1", 0.94, 0.05), ("W2", 0.82, 0.1), ("W5", 0.93, 0.05)],
)
def test_the_gate(workload: str, least: float, more_than_srtf: float) -> None:
    """Small samples of what `bench.scheduling` measures: what is worse than this does not land."""

    def weighted(make: Callable[[], StepPolicy]) -> float:
        found = []
        for seed in (0, 1):
            asked = WORKLOADS[workload].requests(seed, 400)
            history = Simulator(cluster_for(0.0), make).run(asked)
            found.append(share_in_time(counted(history), plan_weight))
        return statistics.mean(found)

    ours, srtf = weighted(GuaranteedSet), weighted(POLICIES["srtf-step"])
    assert ours >= least
    assert ours >= srtf + more_than_srtf
    # whoever is in a hurry waits for steps as long as they may be
    config = StepSchedulerConfig(max_step_s=1e9, section_s=1e9)
    assert weighted(functools.partial(GuaranteedSet, config)) < least
