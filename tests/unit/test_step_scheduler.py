"""The step scheduler's laws, on its own and over whole histories of requests."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.rank_blocks import Block
from autoscaling.step_scheduler import StepSchedulerConfig, guaranteed, next_steps
from autoscaling.tasks import Step, Task

CONFIG = StepSchedulerConfig()
NEVER = 1e12


def make_task(name: str, **changes: object) -> Task:
    task = Task(
        id=name,
        arrived_s=0.0,
        deadline_s=100.0,
        express_from_s=NEVER,
        steps_left=10,
        step_s={1: 1.0, 2: 0.52, 4: 0.3, 8: 0.2},
    )
    return replace(task, **changes)  # type: ignore[arg-type]


def on_one_gpu(name: str, **changes: object) -> Task:
    return make_task(name, step_s={1: 1.0}, **changes)


def run_to_end(
    num_ranks: int, tasks: list[Task], config: StepSchedulerConfig = CONFIG
) -> list[Step]:
    """Every step of a history, in the order of their beginnings; tasks arrive at arrived_s."""
    history: list[Step] = []
    under_way: list[Step] = []
    coming = sorted(tasks, key=lambda task: task.arrived_s)
    waiting: dict[str, Task] = {}
    at_work: dict[str, Task] = {}
    now_s = 0.0
    while coming or waiting or at_work:
        moments = [task.arrived_s for task in coming[:1]] + [step.ends_s for step in under_way]
        now_s = max(now_s, min(moments))
        while coming and coming[0].arrived_s <= now_s:
            task = coming.pop(0)
            waiting[task.id] = task
        for step in [step for step in under_way if step.ends_s <= now_s]:
            under_way.remove(step)
            task = at_work.pop(step.task_id)
            if task.steps_left:
                waiting[task.id] = task
        everyone = [*waiting.values(), *at_work.values()]
        everyone.sort(key=lambda task: (task.arrived_s, task.id))
        begun = next_steps(now_s, num_ranks, everyone, under_way, config)
        for step in begun:
            at_work[step.task_id] = task = replace(waiting.pop(step.task_id))
            step.advance(task)
        under_way += begun
        history += begun
        assert under_way or not waiting, "ranks and requests, but nothing runs"
    return history


def begins_s(step: Step, task: Task) -> float:
    return step.ends_s - task.step_s[step.block.size] / step.sections


tasks_strategy = st.lists(
    st.builds(
        lambda arrived, left, express, steps, first, efficiency, value, model: make_task(
            "?",
            arrived_s=arrived,
            deadline_s=arrived + left,
            express_from_s=arrived + express,
            steps_left=steps,
            step_s={k: first / k**efficiency for k in (1, 2, 4)},
            value=value,
            model=model,
        ),
        st.floats(0, 20),
        st.floats(-60, 60),  # some come here after their deadline
        st.sampled_from([0.0, 30.0, NEVER]),
        st.integers(1, 6),
        st.floats(0.1, 9),
        st.floats(0.3, 1),
        st.floats(0.1, 9),
        st.sampled_from("abc"),
    ),
    min_size=1,
    max_size=8,
).map(lambda tasks: [replace(task, id=str(n)) for n, task in enumerate(tasks)])


@settings(max_examples=150, deadline=None)
@given(tasks_strategy, st.sampled_from([1, 2, 4, 6]))
def test_every_step_runs_once_on_aligned_ranks_of_its_own(
    tasks: list[Task], num_ranks: int
) -> None:
    history = run_to_end(num_ranks, tasks)
    for task in tasks:
        steps = [step for step in history if step.task_id == task.id]
        assert sum(1 / step.sections for step in steps) == pytest.approx(task.steps_left)
        starts = [begins_s(step, task) for step in steps]
        assert all(
            start >= before.ends_s - 1e-9 for before, start in zip(steps, starts[1:], strict=False)
        )
    intervals: dict[int, list[tuple[float, float]]] = {}
    for step in history:
        assert step.block.first % step.block.size == 0
        task = next(task for task in tasks if task.id == step.task_id)
        for rank in step.block.ranks:
            assert rank < num_ranks
            intervals.setdefault(rank, []).append((begins_s(step, task), step.ends_s))
    for taken in intervals.values():
        taken.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(taken))


def test_equals_run_one_after_the_other() -> None:
    history = run_to_end(1, [on_one_gpu("a"), on_one_gpu("b", arrived_s=0.5)])
    assert [step.task_id for step in history] == ["a"] * 10 + ["b"] * 10


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_express_overtakes_at_the_next_boundary(num_ranks: int) -> None:
    busy = [on_one_gpu(f"basic-{n}", deadline_s=11.0) for n in range(2 * num_ranks)]
    express = on_one_gpu("express", arrived_s=2.5, express_from_s=2.5, deadline_s=1000.0)
    history = run_to_end(num_ranks, [*busy, express])
    own = [step for step in history if step.task_id == "express"]
    assert own[0].ends_s == 4.0  # the step that was under way ends at 3
    assert [step.ends_s for step in own] == [4.0 + n for n in range(10)]
    parked = [step for step in history if step.task_id == "basic-0"]
    assert len(parked) == 10  # none of its steps ran twice


def test_without_express_the_earlier_deadline_goes_first() -> None:
    first = on_one_gpu("first", deadline_s=30.0)
    second = on_one_gpu("second", arrived_s=2.5, deadline_s=1000.0)
    history = run_to_end(1, [first, second])
    assert [step.task_id for step in history] == ["first"] * 10 + ["second"] * 10


def test_nothing_starves() -> None:
    """Express requests that always fill the rank, and one that becomes express by waiting."""
    stream = [
        on_one_gpu(
            f"enterprise-{n}",
            arrived_s=2.0 * n,
            express_from_s=0.0,
            steps_left=2,
            deadline_s=2.0 * n + 8.0,
        )
        for n in range(40)
    ]
    ageing = on_one_gpu("free", steps_left=3, deadline_s=10.0, express_from_s=30.0)
    history = run_to_end(1, [*stream, ageing])
    assert max(step.ends_s for step in history if step.task_id == "free") < 40.0
    never = replace(ageing, express_from_s=NEVER)
    history = run_to_end(1, [*stream, never])
    assert max(step.ends_s for step in history if step.task_id == "free") > 80.0


def test_the_smallest_degree_that_leaves_time() -> None:
    config = StepSchedulerConfig(hurry=0.5)

    def degree(deadline_s: float) -> int:
        busy = Step("other", Block(4, 4), 50.0)  # so that nothing grows past what it needs
        task = make_task("t", deadline_s=deadline_s)
        crowd = [make_task(f"c{n}", deadline_s=1000.0, step_s={1: 1.0}) for n in range(3)]
        steps = next_steps(0.0, 8, [task, *crowd], [busy], config)
        return next(step for step in steps if step.task_id == "t").block.size

    assert degree(30.0) == 1  # 10 s within half of 30
    assert degree(12.0) == 2  # 5.2 s
    assert degree(7.0) == 4


def test_a_step_that_is_too_long_for_the_others_is_shared() -> None:
    task = make_task("long", deadline_s=10_000.0, step_s={1: 54.0, 2: 29.0, 4: 14.7, 8: 7.5})
    lend_none = CONFIG.model_copy(update={"min_efficiency": 2.0})
    (step,) = next_steps(0.0, 8, [task], [], lend_none)
    assert step.block.size == 8
    (step,) = next_steps(0.0, 2, [replace(task, step_s={1: 54.0, 2: 29.0})], [], lend_none)
    assert step.block.size == 2  # there is no quicker one


def test_a_long_step_leaves_ranks_to_others_while_nobody_is_pressed() -> None:
    """Only at degree 8 are its steps quick, but by half of the ranks they are made with less."""
    config = CONFIG.model_copy(update={"min_efficiency": 2.0, "patience_s": 80.0})
    long = make_task("long", deadline_s=250.0, step_s={2: 9.0, 4: 4.6, 8: 2.4})
    other = make_task("other", deadline_s=281.0, steps_left=1000, step_s={8: 0.2})

    def size(task: Task, *others: Task, under_way: tuple[Step, ...] = ()) -> int | None:
        steps = next_steps(0.0, 8, [task, *others], under_way, config)
        return next((step.block.size for step in steps if step.task_id == task.id), None)

    late = replace(long, arrived_s=-100.0, deadline_s=-1.0)
    for task in (long, late):
        assert size(task) == 4
        assert size(task, other) == 4  # it has 81 s to spare
        assert size(task, replace(other, deadline_s=279.0)) == 8
        assert size(replace(task, step_s={**long.step_s, 4: 6.1})) == 8
        assert size(replace(task, step_s={**long.step_s, 4: 2.4})) == 4  # quick itself
    at_work = Step("at-work", Block(4, 4), 1.0)
    assert size(replace(long, deadline_s=47.0), under_way=(at_work,)) == 4
    assert size(replace(long, deadline_s=45.0), under_way=(at_work,)) is None  # it would be late
    busy = replace(other, deadline_s=279.0, steps_left=500, step_s={4: 0.4})
    assert size(long, busy, under_way=(Step("other", Block(0, 4), 1.0),)) == 4  # it does not wait


def test_idle_ranks_are_lent_only_if_used_well() -> None:
    task = make_task("t", deadline_s=1000.0)
    for least, size in ((0.6, 8), (0.7, 4), (0.9, 2)):
        config = CONFIG.model_copy(update={"min_efficiency": least})
        (step,) = next_steps(0.0, 8, [task], [], config)
        assert step.block.size == size  # used to 96 %, 83 % and 63 % by 2, 4 and 8
    steps = next_steps(0.0, 2, [task, replace(task, id="u")], [], CONFIG)
    assert [step.block.size for step in steps] == [1, 1]


def test_overload_leaves_out_what_is_worth_least_for_its_work() -> None:
    tasks = [
        on_one_gpu("a", deadline_s=12.0, value=1.0),
        on_one_gpu("b", deadline_s=13.0, value=3.0),
        on_one_gpu("c", deadline_s=26.0, value=1.0),
        on_one_gpu("late", deadline_s=5.0, value=100.0),
    ]
    tasks.sort(key=lambda task: task.deadline_s)
    assert [task.id for _, _, task in guaranteed(0.0, 1, tasks, CONFIG)] == ["b", "c"]
    history = run_to_end(1, tasks)
    ends = {step.task_id: step.ends_s for step in history}
    assert ends["b"] <= 13.0
    assert ends["c"] <= 26.0


def test_what_is_left_of_those_at_work_is_promised_time_too() -> None:
    at_work = on_one_gpu("at-work", deadline_s=10.0, steps_left=8)
    under_way = [Step("at-work", Block(0, 1), 1.0)]
    new = on_one_gpu("new", deadline_s=12.0, steps_left=4)
    busy = {step.task_id: step for step in under_way}
    assert guaranteed(0.0, 1, [new], CONFIG) == [(12.0, 4.0, new)]
    # the new one is worth more for its work
    assert guaranteed(0.0, 1, [at_work, new], CONFIG, busy) == [(12.0, 4.0, new)]
    precious = replace(at_work, value=10.0)
    assert guaranteed(0.0, 1, [precious, new], CONFIG, busy) == [(10.0, 8.0, precious)]
    # a free rank beside it is not given to it a second time
    assert next_steps(0.0, 2, [at_work], under_way, CONFIG) == []


def test_a_step_that_takes_longer_than_it_should_and_has_missed_its_deadline_stops_nobody() -> None:
    slow = make_task("slow", deadline_s=9.0, steps_left=1)
    under_way = [Step("slow", Block(0, 1), 2.0)]
    (step,) = next_steps(10.0, 2, [slow, make_task("new")], under_way, CONFIG)
    assert step.task_id == "new"


def test_who_is_late_gets_a_later_deadline_out_of_what_the_others_leave() -> None:
    """Those in time always want the rank; what they can spare goes to the one that is late."""
    stream = [
        on_one_gpu(f"s{n}", arrived_s=2.0 * n, steps_left=1, deadline_s=2.0 * n + 40.0)
        for n in range(100)
    ] + [
        on_one_gpu(f"t{n}", arrived_s=30.0 + n, steps_left=1, deadline_s=n + 130.0)
        for n in range(40)
    ]
    late = on_one_gpu("late", steps_left=10, deadline_s=5.0)

    def ends_s(late_capacity: float) -> dict[str, float]:
        config = CONFIG.model_copy(update={"late_capacity": late_capacity})
        return {step.task_id: step.ends_s for step in run_to_end(1, [*stream, late], config)}

    with_later, without = ends_s(0.95), ends_s(0.0)
    assert with_later["late"] < 0.8 * without["late"]
    for found in (with_later, without):
        assert all(found[task.id] <= task.deadline_s for task in stream)


def test_who_comes_after_the_deadline_is_served_too() -> None:
    for deadline_s in (5.0, 4.0, -1000.0):
        task = on_one_gpu("t", arrived_s=5.0, deadline_s=deadline_s)
        (step,) = next_steps(5.0, 1, [task], [], CONFIG)
        assert step.task_id == "t"
        (step,) = next_steps(5000.0, 1, [task], [], CONFIG)
        assert step.task_id == "t"


def test_a_wide_block_is_held_for_a_request_in_a_hurry() -> None:
    """Short requests on single ranks would otherwise never leave four neighbours free at once."""
    wide = make_task("wide", arrived_s=0.1, deadline_s=10.0, step_s={4: 0.8})
    small = [
        on_one_gpu(f"s{n}", arrived_s=0.25 * n, steps_left=1, deadline_s=0.25 * n + 300.0)
        for n in range(60)
    ]
    history = run_to_end(4, [wide, *small])
    assert max(step.ends_s for step in history if step.task_id == "wide") <= 10.0
    assert {step.task_id for step in history} == {"wide", *(task.id for task in small)}


def test_a_held_block_is_used_for_steps_that_end_in_time() -> None:
    busy = [Step("x", Block(2, 1), 5.0), Step("y", Block(3, 1), 5.0)]
    task = make_task("t", deadline_s=4.5, steps_left=10, express_from_s=0.0)
    (step,) = next_steps(0.0, 4, [task], busy, CONFIG)
    assert step.block == Block(0, 2)
    slow = replace(task, step_s={2: 5.5, 4: 0.3})
    assert next_steps(0.0, 4, [slow], busy, CONFIG) == []


def test_a_task_stays_where_it_was() -> None:
    task = on_one_gpu("t", block=Block(3, 1))
    (step,) = next_steps(0.0, 4, [task], [], CONFIG)
    assert step.block == Block(3, 1)


def test_a_task_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task t runs at \[4\] of 2 ranks"):
        next_steps(0.0, 2, [make_task("t", step_s={4: 1.0})], [], CONFIG)


def test_those_alike_join_a_step_and_no_others() -> None:
    config = CONFIG.model_copy(update={"max_batch": 3})
    alike = [on_one_gpu(f"a{n}", deadline_s=100.0 + n, batch="square") for n in range(5)]
    other = on_one_gpu("other", deadline_s=101.5, batch="wide")
    alone = on_one_gpu("alone", deadline_s=102.5)
    (step,) = next_steps(0.0, 1, [*alike, other, alone], [], config)
    assert (step.task_id, step.batched, step.ends_s) == ("a0", ("a1", "a2"), 3.0)
    steps = next_steps(0.0, 2, [*alike, other, alone], [], config)
    assert [(step.task_id, step.batched) for step in steps] == [
        ("a0", ("a2", "a3")),
        ("a1", ("a4",)),
    ]
    steps = next_steps(0.0, 1, [*alike, other, alone], [], CONFIG)
    assert [step.batched for step in steps] == [()]


def test_a_shared_step_takes_nobody_along() -> None:
    config = CONFIG.model_copy(update={"max_batch": 3})
    pair = [make_task(f"a{n}", step_s={2: 1.0}, batch="square") for n in range(2)]
    (step,) = next_steps(0.0, 2, pair, [], config)
    assert step.batched == ()


def test_a_degree_that_there_are_no_ranks_for_makes_nobody_look_quicker() -> None:
    """Shared by 8 it would have 13 s to spare; by the 2 that there are 5 s: the free rank waits."""
    hurried = make_task("hurried", deadline_s=15.0, step_s={2: 1.0, 8: 0.2})
    busy = [Step("x", Block(0, 1), 1.0)]
    calm = on_one_gpu("calm", deadline_s=1000.0)
    assert next_steps(0.0, 2, [hurried, calm], busy, CONFIG) == []
    (step,) = next_steps(0.0, 2, [replace(hurried, deadline_s=50.0), calm], busy, CONFIG)
    assert step.task_id == "calm"
