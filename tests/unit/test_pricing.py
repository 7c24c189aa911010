"""Prices are exact, rounded once, and what is charged follows the work done."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from credits.pricing import (
    Credits,
    Passes,
    PriceTable,
    WorkWeights,
    charge,
    quote,
    round_half_up,
    share_done,
)
from models.request import InvalidRequest, ModelFamily


@pytest.mark.parametrize(
    ("family", "num_frames", "width", "height", "credits"),
    [
        (ModelFamily.ANIMATEDIFF, 16, 512, 512, 16),
        (ModelFamily.SVD_XT, 25, 1024, 576, 84),
        (ModelFamily.Z_IMAGE_VIDEO, 48, 1280, 720, 288),
        (ModelFamily.HUNYUAN_VIDEO, 129, 1280, 720, 1161),
    ],
)
def test_the_founding_examples_hold_to_the_credit(
    family: ModelFamily, num_frames: int, width: int, height: int, credits: int
) -> None:
    price = quote(PriceTable(), family, num_frames=num_frames, width=width, height=height)
    assert price.credits == credits


@pytest.mark.parametrize(
    ("area_side", "multiplier"),
    [((512, 512), "1"), ((512, 514), "9/4"), ((1280, 720), "3"), ((1280, 722), "27/4")],
)
def test_resolution_bands_include_their_edge(area_side: tuple[int, int], multiplier: str) -> None:
    width, height = area_side
    price = quote(PriceTable(), ModelFamily.ANIMATEDIFF, num_frames=1, width=width, height=height)
    assert price.resolution_multiplier == Fraction(multiplier)


def test_above_the_largest_band_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="2073600"):
        quote(PriceTable(), ModelFamily.ANIMATEDIFF, num_frames=1, width=1922, height=1080)


def test_the_least_price_is_one_credit() -> None:
    table = PriceTable(model={ModelFamily.ANIMATEDIFF: "0.1"})
    assert quote(table, ModelFamily.ANIMATEDIFF, num_frames=1, width=64, height=64).credits == 1


@pytest.mark.parametrize(("value", "rounded"), [("1/2", 1), ("3/2", 2), ("5/2", 3), ("49/100", 0)])
def test_halves_round_up(value: str, rounded: int) -> None:
    assert round_half_up(Fraction(value)) == rounded


counts = st.integers(0, 50)


@given(st.tuples(counts, counts, counts, counts), st.tuples(counts, counts, counts, counts))
def test_the_share_is_at_most_all_and_more_work_never_costs_less(
    planned: tuple[int, int, int, int], done: tuple[int, int, int, int]
) -> None:
    share = share_done(WorkWeights(), Passes(*planned), Passes(*done))
    more = share_done(WorkWeights(), Passes(*planned), Passes(*(count + 1 for count in done)))
    assert 0 <= share <= more <= 1


def test_work_is_weighted_by_stage() -> None:
    planned = Passes(text=1, denoise=10, decode=13, media=1)
    half = share_done(WorkWeights(), planned, Passes(1, 5, 0, 0))
    assert half == Fraction(2 + 45, 100)
    assert charge(Fraction(26), Credits(26), half) == 12


def test_a_charge_never_exceeds_the_reservation() -> None:
    assert charge(Fraction("10.4"), Credits(10), Fraction(1)) == 10
    assert charge(Fraction(100), Credits(10), Fraction(1)) == 10
