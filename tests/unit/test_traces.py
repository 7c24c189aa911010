"""Recorded requests: written, read, and refused where they are none."""

import itertools
import json
import random

import pytest

from autoscaling.traces import TraceLine, kind_of, read_trace
from autoscaling.workloads import HETU_KINDS, KINDS, PLANS, mean_work_s, poisson, requests
from models.request import ModelFamily

LINE = {
    "at_s": 1.5,
    "family": "hunyuan-video",
    "num_frames": 129,
    "width": 1280,
    "height": 720,
    "num_steps": 30,
    "plan": "pro",
    "account": 3,
}


def test_what_is_written_is_read() -> None:
    rng = random.Random(0)
    asked = list(itertools.islice(requests(poisson(rng, 0.1), rng, plans=PLANS), 50))
    lines = [
        TraceLine(
            at_s=one.arrived_s,
            family=one.kind.family,
            num_frames=one.kind.num_frames,
            width=one.kind.width,
            height=one.kind.height,
            num_steps=one.kind.num_steps,
            plan=one.plan,
            account=one.account,
        ).model_dump_json()
        for one in asked
    ]
    assert list(read_trace(lines)) == asked


def test_steps_are_the_recorded_ones() -> None:
    (one,) = read_trace([json.dumps(LINE)])
    assert (one.kind.num_steps, one.account, one.plan) == (30, 3, "pro")
    assert one.kind.measured_s == KINDS[-1].measured_s


def test_a_size_that_nobody_published_is_predicted() -> None:
    kind = kind_of(ModelFamily.HUNYUAN_VIDEO, 97, 1280, 720)
    known = kind_of(ModelFamily.HUNYUAN_VIDEO, 129, 1280, 720)
    assert set(kind.measured_s) == {1, 2, 4, 8}
    assert 0.3 * known.measured_s[1] < kind.measured_s[1] < 1.6 * known.measured_s[1]
    assert kind_of(ModelFamily.HUNYUAN_VIDEO, 17, 960, 544) is HETU_KINDS[0]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"plan": "gold"}, "plan"),
        ({"at_s": -1}, "at_s"),
        ({"frames": 4}, "frames"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_a_line_that_is_none_is_named(change: dict[str, object], names: str) -> None:
    lines = [json.dumps(LINE), json.dumps({**LINE, **change})]
    with pytest.raises(ValueError, match=f"line 2 of the trace(.|\n)*{names}"):
        list(read_trace(lines))


def test_time_does_not_go_back() -> None:
    lines = [json.dumps(LINE), json.dumps({**LINE, "at_s": 1.0})]
    with pytest.raises(ValueError, match="line 2 of the trace: at_s goes back"):
        list(read_trace(lines))


def test_the_published_traces_kinds_are_short() -> None:
    share = 1 / len(HETU_KINDS)
    assert {kind.num_steps for kind in HETU_KINDS} == {6}
    assert mean_work_s((share,) * len(HETU_KINDS), HETU_KINDS) < mean_work_s() / 2
