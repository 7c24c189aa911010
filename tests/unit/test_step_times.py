"""What a step is expected to take, and when it is due."""

from autoscaling.step_times import REMEMBERED, StepTimes
from autoscaling.urgency import UrgencyConfig, judge
from models.cost import denoise_shape
from models.request import ModelFamily

SHAPE = denoise_shape(ModelFamily.SVD_XT, 25, 1024, 576)
OTHER = denoise_shape(ModelFamily.SVD_XT, 25, 512, 576)


def test_measured_beats_predicted_and_corrects_it_elsewhere() -> None:
    times = StepTimes()
    assert times.expect("svd", SHAPE, 1, predicted_s=2.0) == 2.0
    for took_s in (5.8, 6.0, 60.0):  # a hiccup does not count
        times.observe("svd", SHAPE, 1, predicted_s=2.0, took_s=took_s)
    assert times.expect("svd", SHAPE, 1, predicted_s=2.0) == 6.0
    assert times.expect("svd", SHAPE, 2, predicted_s=1.2) == 3.0 * 1.2
    assert times.expect("svd", OTHER, 1, predicted_s=1.0) == 3.0
    assert times.expect("another", SHAPE, 1, predicted_s=2.0) == 2.0
    assert (times.known("svd", SHAPE, 1), times.known("svd", SHAPE, 2)) == (3, 0)


def test_old_steps_are_forgotten() -> None:
    times = StepTimes()
    for took_s in [1.0] * REMEMBERED + [4.0] * REMEMBERED:
        times.observe("svd", SHAPE, 1, predicted_s=2.0, took_s=took_s)
    assert times.expect("svd", SHAPE, 1, predicted_s=2.0) == 4.0
    assert times.known("svd", SHAPE, 1) == REMEMBERED


def test_plans_differ_in_how_long_they_wait_and_whom_they_overtake() -> None:
    config = UrgencyConfig()
    judged = [
        judge(config, priority=priority, admitted_s=100.0, num_steps=10, step_s={1: 4.0, 2: 2.1})
        for priority in range(5)
    ]
    deadlines = [urgency.deadline_s for urgency in judged]
    assert deadlines[3] == 100.0 + 2.0 + 1.5 * 10 * 2.1
    assert deadlines == sorted(deadlines, reverse=True)
    assert deadlines[4] == deadlines[3]
    assert judged[3].express_from_s == 100.0
    assert judged[2].express_from_s == 100.0 + config.ageing_s
    values = [urgency.value for urgency in judged[:4]]
    assert values == sorted(values)


def test_a_degree_that_wastes_ranks_does_not_make_the_deadline() -> None:
    config = UrgencyConfig()
    wasteful = judge(config, priority=3, admitted_s=0.0, num_steps=10, step_s={1: 4.0, 8: 3.0})
    assert wasteful.deadline_s == 2.0 + 1.5 * 10 * 4.0
