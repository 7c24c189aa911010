"""A step in sections: what it makes, what it costs to leave it, and whom it lets pass."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deployments.rank import Rank
from models.attention import attention_kernels
from models.catalog import Model, load_model
from models.conditioning import FloatArray
from models.memory import OutOfMemory, within_memory
from models.pausing import PausableStep, let_pause
from models.request import VideoRequest
from models.stages import load_encoder
from models.tensors import ParkedState
from parallel.plan import ParallelPlan
from parallel.traffic import Traffic
from tests.unit.test_families import RandomFamily
from tests.unit.test_rank import make_rank

ALONE = ParallelPlan()


def blocks(number: int) -> nn.Sequential:
    made = nn.Sequential(*[nn.Identity() for _ in range(number)])
    let_pause(made)
    return made


@pytest.mark.parametrize(
    ("num_blocks", "num_sections", "told", "pauses"),
    [
        (6, 3, 6, 2),
        (6, 1, 6, 0),
        (6, 4, 6, 3),
        (6, 9, 6, 5),
        (7, 3, 7, 2),
        (3, 3, 6, 1),
        (6, 3, 3, 2),
    ],
)
def test_sections_are_of_equally_many_blocks(
    num_blocks: int, num_sections: int, told: int, pauses: int
) -> None:
    """told: how many blocks it was said to have; with more than that it does not pause again."""
    run = blocks(num_blocks)
    passed: list[int] = []
    run.append(nn.Identity())
    for number, block in enumerate(run):
        block.register_forward_pre_hook(lambda *_, number=number: passed.append(number))
    step = PausableStep(lambda: run(torch.ones(1)) + 1, told, num_sections)
    stood = []
    while not step.go_on():
        stood.append(len(passed))
    assert len(stood) == pauses
    assert step.result() == 2
    sizes = np.diff([0, *stood, num_blocks])
    if told == num_blocks:
        assert max(sizes) - min(sizes) <= 1
    run(torch.ones(1))  # nobody pauses who is not asked to


def test_what_a_step_raises_is_raised_where_it_is_asked_for() -> None:
    run = blocks(2)

    def act() -> None:
        run(torch.ones(1))
        raise MemoryError("no room")

    step = PausableStep(lambda: within_memory("m", act), 2, 2)
    assert not step.go_on()
    assert step.go_on()
    with pytest.raises(OutOfMemory, match="no room"):
        step.result()


@pytest.fixture
def _without_cycles() -> Iterator[None]:
    """Nothing is freed that refers to itself: on a GPU, memory would not come back in time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("_without_cycles")
def test_a_step_that_is_left_or_fails_gives_back_what_it_had(fails: bool) -> None:
    run = blocks(2)
    seen: list[weakref.ref[torch.Tensor]] = []
    ended = []

    def act() -> None:
        large = torch.ones(10)
        seen.append(weakref.ref(large))
        try:
            run(large)
            raise MemoryError("no room")
        finally:
            ended.append(True)

    step = PausableStep(act, 2, 2)
    del act
    step.go_on()
    assert not ended
    if fails:
        step.go_on()
        with pytest.raises(MemoryError) as raised:
            step.result()
        del raised
    else:
        step.abandon()
    assert ended
    assert not step.thread.is_alive()
    assert seen[0]() is None


def test_to_leave_a_step_that_has_ended_is_nothing() -> None:
    done = PausableStep(lambda: 1, 2, 2)
    assert done.go_on()
    done.abandon()


def test_attention_is_restricted_for_the_step_alone_that_has_paused() -> None:
    run, expected = blocks(2), attention_kernels()
    within = []

    def act() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            within.append(attention_kernels())
            run(torch.ones(1))
            within.append(attention_kernels())

    step = PausableStep(act, 2, 2)
    step.go_on()
    assert attention_kernels() == expected
    step.go_on()
    assert within[0] == within[1] != expected
    assert attention_kernels() == expected


class Pair:
    """A rank with two models, and of each a request before its first step."""

    def __init__(self, rank: Rank, *models: Model) -> None:
        self.rank = rank
        self.requests: list[VideoRequest] = []
        self.before: list[tuple[Any, ParkedState]] = []
        for model in models:
            request = model.resolve({"prompt": "x", "num_steps": 2, "seed": 1, "num_frames": 5})
            conditioning = load_encoder(model).encode(request, None)
            self.requests.append(request)
            self.before.append((conditioning, rank.start(request, conditioning)))

    def step(self, which: int, num_sections: int = 1) -> ParkedState | None:
        """The first, or all, of one's sections; the state if it has ended."""
        return self.state(
            self.rank.step(ALONE, (0,), num_sections, [self.requests[which]], *self.before[which])
        )

    def go_on(self) -> ParkedState | None:
        return self.state(self.rank.go_on())

    def state(self, answer: tuple[Any, ...]) -> ParkedState | None:
        traffic, state = answer
        assert isinstance(traffic, Traffic)
        assert state is None or isinstance(state, ParkedState)
        return state


@pytest.fixture
def pair(model: Model, random_family: RandomFamily) -> Pair:
    other = load_model(random_family("animatediff"))
    rank = make_rank(model)
    rank.load(other)
    return Pair(rank, other, model)


def latents(state: ParkedState | None) -> FloatArray:
    assert state is not None
    return state.latents


def test_a_rank_makes_another_models_step_while_one_stands(pair: Pair) -> None:
    whole, other = latents(pair.step(0)), latents(pair.step(1))
    assert pair.step(0, num_sections=3) is None
    for which, num_sections in ((0, 1), (1, 2)):
        with pytest.raises(RuntimeError, match="has paused here"):
            pair.step(which, num_sections)
    assert np.array_equal(latents(pair.step(1)), other)
    assert pair.go_on() is None
    assert np.array_equal(latents(pair.go_on()), whole)


def test_after_an_abandoned_step_its_model_is_as_before(pair: Pair) -> None:
    whole = latents(pair.step(0))
    pair.rank.abandon()  # nothing has paused
    assert pair.step(0, num_sections=3) is None
    pair.rank.abandon()
    assert np.array_equal(latents(pair.step(0)), whole)
