"""Requests for the simulator, made from a seed: how they arrive, what they ask for, who pays.

The mix is of four families at eight sizes. Their step times are those that were published: of
Hetu-DiT's profile on L20s (`model_profiler.py`), taken to A100s by 54.4 s for HunyuanVideo's
largest step, and this project's own roofline for the UNets.
"""

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from credits.plans import Plan
from models.cost import denoise_shape
from models.request import ModelFamily
from parallel.plan import StepShape, TokenShape

# Weights of the three families' denoisers in 16 bits, all on every GPU: 26, 3.0 and 2.6 GB.
WEIGHTS_GB = 31.6
A100_OF_L20 = 54.4 / 118


@dataclass(frozen=True, slots=True)
class VideoKind:
    """What is asked for; measured_s: seconds of a step on an A100, by degree."""

    name: str
    family: ModelFamily
    num_frames: int
    width: int
    height: int
    num_steps: int
    measured_s: Mapping[int, float]

    @property
    def shape(self) -> StepShape:
        """Of a step."""
        guided = self.family is not ModelFamily.HUNYUAN_VIDEO
        return denoise_shape(self.family, self.num_frames, self.width, self.height, guided=guided)

    def memory_gb(self, degree: int) -> float:
        """Of each GPU, for the activations of a step that so many share.

        74 GB less 26 of weights was seen on one GPU, for HunyuanVideo's largest video; the UNets'
        are small beside that.
        """
        shape = self.shape
        tokens = shape.num_tokens if isinstance(shape, TokenShape) else 0
        return 48.0 * tokens / 119_056 / degree

    @property
    def work_s(self) -> float:
        """GPU-seconds of all steps on one GPU."""
        return self.num_steps * self.measured_s[1]


def _hunyuan(frames: int, width: int, height: int, *l20_s: float) -> VideoKind:
    measured_s = {degree: s * A100_OF_L20 for degree, s in zip((1, 2, 4, 8), l20_s, strict=True)}
    name = f"hunyuan-{min(width, height)}p-{frames}f"
    return VideoKind(name, ModelFamily.HUNYUAN_VIDEO, frames, width, height, 50, measured_s)


ANIMATEDIFF = VideoKind(
    "animatediff-512p-16f",
    ModelFamily.ANIMATEDIFF,
    16,
    512,
    512,
    25,
    {1: 0.253, 2: 0.133, 4: 0.079, 8: 0.063},
)
SVD_XT = VideoKind(
    "svd-xt-576p-25f",
    ModelFamily.SVD_XT,
    25,
    1024,
    576,
    25,
    {1: 1.14, 2: 0.60, 4: 0.335, 8: 0.204},
)
KINDS = (
    ANIMATEDIFF,
    SVD_XT,
    _hunyuan(33, 960, 544, 6.01, 3.68, 2.03, 1.0),
    _hunyuan(65, 960, 544, 15.09, 8.76, 4.51, 2.3),
    _hunyuan(129, 960, 544, 43.58, 24.6, 12.4, 6.67),
    _hunyuan(33, 1280, 720, 13.7, 8.01, 4.1, 2.35),
    _hunyuan(65, 1280, 720, 37.53, 21.0, 10.7, 5.8),
    _hunyuan(129, 1280, 720, 118.0, 64.48, 31.92, 16.35),
)
# What TridentServe's trace of HunyuanVideo asks for, in six steps each.
HETU_KINDS = tuple(
    replace(kind, num_steps=6)
    for kind in (
        _hunyuan(17, 960, 544, 2.77, 1.83, 1.02, 0.68),
        _hunyuan(17, 1280, 720, 5.84, 3.61, 1.86, 1.08),
        *KINDS[2:],
    )
)
MIX = (0.25, 0.25, 0.20, 0.12, 0.06, 0.07, 0.03, 0.02)
# For days on which what is asked for changes: short videos mostly, long ones mostly.
SMALL_MIX = (0.45, 0.45, 0.10, 0.0, 0.0, 0.0, 0.0, 0.0)
LARGE_MIX = (0.05, 0.05, 0.30, 0.25, 0.15, 0.10, 0.06, 0.04)
Mix = Sequence[float]
DAY_S = 86_400.0
PLANS = {Plan.PRO: 0.2, Plan.BASIC: 0.5, Plan.FREE: 0.3}


class Asked(NamedTuple):
    """A request of a workload: when it arrives, what it asks for, whose it is."""

    arrived_s: float
    kind: VideoKind
    plan: Plan
    account: int


def mean_work_s(mix: Mix = MIX, kinds: Sequence[VideoKind] = KINDS) -> float:
    """GPU-seconds of one request of a mix, on one GPU."""
    return sum(share * kind.work_s for share, kind in zip(mix, kinds, strict=True))


def requests(
    arrivals: Iterator[float],
    rng: random.Random,
    *,
    plans: Mapping[Plan, float] | None = None,
    mix: Callable[[float], Mix] = lambda _: MIX,
    kinds: Sequence[VideoKind] = KINDS,
    num_accounts: int = 500,
) -> Iterator[Asked]:
    """One request at each arrival. plans: their shares, by default everyone's is the basic one;
    mix: shares of the kinds, at a moment. Accounts by Zipf's law, exponent 0.8, as in GenTD26.
    """
    shares_of: dict[Mix, list[float]] = {}
    zipf = list(itertools.accumulate((n + 1) ** -0.8 for n in range(num_accounts)))
    chosen = plans or {Plan.BASIC: 1.0}
    names, shares = list(chosen), list(itertools.accumulate(chosen.values()))
    for arrived_s in arrivals:
        now = mix(arrived_s)
        if now not in shares_of:
            shares_of[now] = list(itertools.accumulate(now))
        yield Asked(
            arrived_s,
            kinds[_drawn(rng, shares_of[now])],
            names[_drawn(rng, shares)],
            _drawn(rng, zipf),
        )


def _drawn(rng: random.Random, accumulated: Sequence[float]) -> int:
    """A number, as likely as its share."""
    return bisect.bisect(accumulated, rng.random() * accumulated[-1], hi=len(accumulated) - 1)


def poisson(rng: random.Random, per_s: float) -> Iterator[float]:
    """Moments of a Poisson process, without end."""
    now_s = 0.0
    while True:
        now_s += rng.expovariate(per_s)
        yield now_s


def varying(
    rng: random.Random, per_s: Callable[[float], float], most_per_s: float
) -> Iterator[float]:
    """A Poisson process whose rate changes, by thinning (Lewis and Shedler, 1979)."""
    for moment_s in poisson(rng, most_per_s):
        if rng.random() * most_per_s < per_s(moment_s):
            yield moment_s


def work_of_day(moment_s: float, mean: float, peak: float = 1.7) -> float:
    """Work that comes a second at a moment of a day: a sinus, least at its beginning."""
    return mean * (1 + (peak - 1) * math.sin(2 * math.pi * (moment_s / DAY_S - 0.25)))


def mix_of_day(moment_s: float) -> Mix:
    """Short videos and long ones in turn, for three hours each."""
    return SMALL_MIX if int(moment_s / 10_800) % 2 == 0 else LARGE_MIX


def steady(rng: random.Random, per_s: float) -> Iterator[float]:
    """At equal distances."""
    return itertools.count(rng.random() / per_s, 1 / per_s)


def bursts(
    rng: random.Random,
    per_s: float,
    *,
    factor: float = 4.0,
    share: float = 0.15,
    mean_s: float = 180.0,
) -> Iterator[float]:
    """A Poisson process that is `factor` times as quick for `share` of the time, in bursts of
    mean_s seconds on average, and per_s a second over all.
    """
    calm_per_s = per_s * (1 - factor * share) / (1 - share)
    rates = {True: factor * per_s, False: calm_per_s}
    lengths = {True: mean_s, False: mean_s * (1 - share) / share}
    now_s, burst = 0.0, False
    until_s = rng.expovariate(1 / lengths[burst])
    while True:
        gap_s = rng.expovariate(rates[burst])
        if now_s + gap_s <= until_s:
            now_s += gap_s
            yield now_s
        else:  # memoryless: the gap is drawn again at the new rate
            now_s, burst = until_s, not burst
            until_s = now_s + rng.expovariate(1 / lengths[burst])
