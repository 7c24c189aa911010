"""The bound on what can be kept: never below what is kept, and by hand."""

from dataclasses import replace

import pytest

from autoscaling.simulated_cluster import Job
from autoscaling.simulator import GuaranteedSet, Simulator
from autoscaling.tasks import Task
from autoscaling.workloads import ANIMATEDIFF, Asked
from bench.clairvoyant import clairvoyant_bound, least_work_s
from bench.node_runs import POLICIES, WORKLOADS, cluster_for
from credits.plans import Plan

ONE_GPU = replace(ANIMATEDIFF, num_steps=10, measured_s={1: 1.0})
TWO = replace(ANIMATEDIFF, num_steps=10, measured_s={1: 1.0, 2: 0.6})


def job(number: int, arrived_s: float, due_s: float, kind: object = ONE_GPU) -> Job:
    asked = Asked(arrived_s, kind, Plan.BASIC, 0)  # type: ignore[arg-type]
    steps = asked.kind.num_steps
    task = Task(str(number), arrived_s, due_s, 1e9, steps, asked.kind.measured_s)
    return Job(asked, task, 1.0, steps)


def alike(_: Job) -> float:
    return 1.0


def test_the_least_work_is_that_of_two_degrees_where_one_is_too_slow() -> None:
    assert least_work_s(job(0, 0.0, 20.0, TWO), 2) == 10.0
    assert least_work_s(job(0, 0.0, 6.0, TWO), 2) == pytest.approx(12.0)
    assert least_work_s(job(0, 0.0, 8.0, TWO), 2) == pytest.approx(11.0)
    assert least_work_s(job(0, 0.0, 5.9, TWO), 2) is None


def test_a_window_holds_what_it_holds() -> None:
    three = [job(number, 0.0, 15.0) for number in range(3)]
    assert clairvoyant_bound(three, 1, alike) == pytest.approx(1.5)
    assert clairvoyant_bound(three, 2, alike) == pytest.approx(3.0)
    later = [*three, job(3, 15.0, 25.0), job(4, 15.0, 24.0)]
    assert clairvoyant_bound(later, 1, alike) == pytest.approx(2.5)


def test_who_is_worth_more_is_kept() -> None:
    two = [job(0, 0.0, 10.0), job(1, 0.0, 10.0)]
    assert clairvoyant_bound(two, 1, lambda one: 1.0 + 2 * int(one.task.id)) == pytest.approx(3.0)


@pytest.mark.parametrize("policy", ["guaranteed-set", "srtf-step", "fifo-4"])
@pytest.mark.parametrize("workload", ["W1", "W2"])
def test_nobody_keeps_more_than_the_bound(policy: str, workload: str) -> None:
    asked = WORKLOADS[workload].requests(3, 150)
    make = POLICIES.get(policy, GuaranteedSet)
    history = Simulator(cluster_for(0.0), make).run(asked)
    most = clairvoyant_bound(history.jobs, 8, alike)
    assert sum(one.in_time for one in history.jobs) <= most + 1e-6
    assert most <= len(history.jobs)
