"""Recorded requests as JSON lines, to be replayed in the simulator.

A line has `at_s` (seconds since the first), `family`, `num_frames`, `width`, `height`, `num_steps`,
`plan` and `account`, a number that stands for whoever asked.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pydantic import BaseModel, Field

from autoscaling.workloads import HETU_KINDS, KINDS, Asked, VideoKind
from credits.plans import Plan
from models.cost import denoise_shape
from models.request import ModelFamily
from parallel.plan import P4D, predict_step, quickest_plans

DEGREES = (1, 2, 4, 8)


class TraceLine(BaseModel, frozen=True, extra="forbid"):
    """One request."""

    at_s: float = Field(ge=0)
    family: ModelFamily
    num_frames: int = Field(ge=1)
    width: int = Field(ge=2)
    height: int = Field(ge=2)
    num_steps: int = Field(ge=1)
    plan: Plan
    account: int = Field(ge=0)


def read_trace(lines: Iterable[str]) -> Iterator[Asked]:
    """The requests, in the order of their lines. ValueError names the line that is none, or that
    comes before the one above it.
    """
    before_s = 0.0
    for number, text in enumerate(lines, 1):
        try:
            line = TraceLine.model_validate(json.loads(text))
        except ValueError as error:
            raise ValueError(f"line {number} of the trace: {error}") from error
        if line.at_s < before_s:
            raise ValueError(f"line {number} of the trace: at_s goes back to {line.at_s}")
        before_s = line.at_s
        kind = kind_of(line.family, line.num_frames, line.width, line.height)
        yield Asked(line.at_s, replace(kind, num_steps=line.num_steps), line.plan, line.account)


@functools.cache
def kind_of(family: ModelFamily, num_frames: int, width: int, height: int) -> VideoKind:
    """With step times that were published, where there are any, else with predicted ones."""
    for kind in (*KINDS, *HETU_KINDS):
        if (kind.family, kind.num_frames, kind.width, kind.height) == (
            family,
            num_frames,
            width,
            height,
        ):
            return kind
    guided = family is not ModelFamily.HUNYUAN_VIDEO
    shape = denoise_shape(family, num_frames, width, height, guided=guided)
    plans = quickest_plans(shape, DEGREES[-1], P4D, DEGREES)
    measured_s = {degree: predict_step(shape, plan, P4D).step_s for degree, plan in plans.items()}
    name = f"{family}-{min(width, height)}p-{num_frames}f"
    return VideoKind(name, family, num_frames, width, height, 1, measured_s)
