"""Steps that pause, as the step scheduler places them: where they go on, and who comes between."""

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.rank_blocks import Block
from autoscaling.step_scheduler import StepSchedulerConfig, next_steps
from autoscaling.tasks import Paused, Step, Task
from tests.unit.test_step_scheduler import (
    CONFIG,
    begins_s,
    make_task,
    on_one_gpu,
    run_to_end,
    tasks_strategy,
)


@settings(max_examples=150, deadline=None)
@given(tasks_strategy, st.sampled_from([1, 2, 4]))
def test_a_paused_step_goes_on_where_it_was_and_only_other_models_come_between(
    tasks: list[Task], num_ranks: int
) -> None:
    by_id = {task.id: task for task in tasks}
    history = run_to_end(num_ranks, tasks)
    for task in tasks:
        own = [step for step in history if step.task_id == task.id]
        while own:
            sections = own[: own[0].sections]
            del own[: len(sections)]
            assert {(step.block, step.sections) for step in sections} == {
                (sections[0].block, len(sections))
            }
            took_s = task.step_s[sections[0].block.size] / len(sections)
            assert took_s <= CONFIG.section_s or len(sections) == 1
            first, last = sections[0].ends_s, begins_s(sections[-1], task)
            between = [
                step
                for step in history
                if first < step.ends_s and begins_s(step, by_id[step.task_id]) < last
                if step.task_id != task.id
                if set(step.block.ranks) & set(sections[0].block.ranks)
            ]
            assert all(step.sections == 1 for step in between)
            assert all(by_id[step.task_id].model != task.model for step in between)


def test_another_model_overtakes_within_a_step() -> None:
    long = make_task("long", step_s={1: 9.0}, model="long", steps_left=2)
    short = on_one_gpu("short", arrived_s=1.0, model="short", deadline_s=20.0, steps_left=3)
    history = run_to_end(1, [long, short])
    assert [step.task_id for step in history] == ["long"] + ["short"] * 3 + ["long"] * 7
    assert [step.ends_s for step in history][:2] == [2.25, 3.25]
    alike = run_to_end(1, [long, replace(short, model="long")])
    assert [step.task_id for step in alike] == ["long"] * 4 + ["short"] * 3 + ["long"] * 4
    for section_s in (10.0, math.inf):
        never = StepSchedulerConfig(section_s=section_s)
        assert [step.ends_s for step in run_to_end(1, [long, short], never)][:2] == [9.0, 10.0]


def test_a_paused_step_goes_on_for_the_sake_of_whom_it_hinders() -> None:
    """Though it is late, and has the least claim of all."""
    paused = make_task(
        "paused", step_s={2: 9.0}, model="m", deadline_s=-90.0, paused=Paused(Block(0, 2), 4)
    )
    paused.steps_left = 9.5
    urgent = make_task("urgent", step_s={2: 1.0}, model="m", deadline_s=11.0)
    other = make_task("other", step_s={1: 1.0}, model="o", deadline_s=50.0)
    (step,) = next_steps(0.0, 2, [paused, urgent, other], [], CONFIG)
    assert (step.task_id, step.ends_s) == ("paused", 2.25)
    (step,) = next_steps(0.0, 2, [paused, replace(urgent, model="n"), other], [], CONFIG)
    assert step.task_id == "urgent"
    busy = [Step("other", Block(0, 1), 0.5)]
    # the rank that is idle is kept for it
    assert next_steps(0.0, 2, [paused, urgent, replace(other, id="more")], busy, CONFIG) == []


def test_who_waits_for_a_paused_step_runs_elsewhere_if_there_is_room() -> None:
    paused = make_task(
        "paused", step_s={4: 9.0}, model="m", deadline_s=5000.0, paused=Paused(Block(0, 4), 4)
    )
    paused.steps_left = 9.5
    urgent = make_task("urgent", step_s={4: 1.0}, model="m", deadline_s=11.0)
    singles = [on_one_gpu(f"s{n}", model="s", deadline_s=50.0) for n in range(4)]
    busy = [Step("other", Block(7, 1), 1.0)]
    steps = next_steps(0.0, 8, [paused, urgent, *singles], busy, CONFIG)
    assert [step.task_id for step in steps] == ["paused"]  # 4 to 6 are held for the urgent one
    calm = replace(urgent, step_s={2: 1.0, 4: 0.6}, deadline_s=16.0)
    halves = [Step("other", Block(0, 1), 1.0), busy[0]]
    (step,) = next_steps(0.0, 8, [paused, calm], halves, CONFIG)
    assert (step.task_id, step.block) == ("urgent", Block(4, 2))


def test_a_paused_step_joins_no_batch_and_a_batch_does_not_pause() -> None:
    config = StepSchedulerConfig(max_batch=2)
    pair = [
        make_task(name, step_s={1: 9.0}, batch="x", model="m", deadline_s=1000.0) for name in "ab"
    ]
    (step,) = next_steps(0.0, 1, pair, [], config)
    assert (step.batched, step.sections, step.ends_s) == (("b",), 1, 18.0)
    for paused in pair:
        other = next(task for task in pair if task is not paused)
        begun = replace(paused, steps_left=9.25, paused=Paused(Block(0, 1), 4))
        (step,) = next_steps(0.0, 1, [begun, other], [], config)
        assert (step.task_id, step.batched, step.sections) == (paused.id, (), 4)
