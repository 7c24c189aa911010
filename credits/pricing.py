"""What a video costs: exact rationals, rounded once, by a table that is data."""

from dataclasses import dataclass
from fractions import Fraction
from typing import NewType

from pydantic import BaseModel, Field

from models.request import InvalidRequest, ModelFamily

Credits = NewType("Credits", int)


class ResolutionBand(BaseModel, frozen=True, extra="forbid"):
    """Sizes up to max_area pixels cost multiplier times the base."""

    max_area: int
    multiplier: str


class PriceTable(BaseModel, frozen=True, extra="forbid"):
    """Multipliers are decimal strings, so that a price is exact."""

    base: int = 1
    resolution: list[ResolutionBand] = [
        ResolutionBand(max_area=262_144, multiplier="1.0"),
        ResolutionBand(max_area=589_824, multiplier="2.25"),
        ResolutionBand(max_area=921_600, multiplier="3.0"),
        ResolutionBand(max_area=2_073_600, multiplier="6.75"),
    ]
    model: dict[ModelFamily, str] = {
        ModelFamily.ANIMATEDIFF: "1.0",
        ModelFamily.SVD: "1.5",
        ModelFamily.SVD_XT: "1.5",
        ModelFamily.Z_IMAGE_VIDEO: "2.0",
        ModelFamily.HUNYUAN_VIDEO: "3.0",
    }


class WorkWeights(BaseModel, frozen=True, extra="forbid"):
    """How a job's price is spread over its stages; each stage evenly over its passes."""

    text: int = Field(2, ge=0)
    denoise: int = Field(90, ge=0)
    decode: int = Field(6, ge=0)
    media: int = Field(2, ge=0)


@dataclass(frozen=True, slots=True)
class Quote:
    """A price with its factors: credits is exact rounded half up, at least 1."""

    credits: Credits
    exact: Fraction
    base: int
    num_frames: int
    resolution_multiplier: Fraction
    model_multiplier: Fraction


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of each stage, planned or done: texts, denoise steps, decoded frames, files."""

    text: int
    denoise: int
    decode: int
    media: int


def quote(
    table: PriceTable, family: ModelFamily, *, num_frames: int, width: int, height: int
) -> Quote:
    """base x frames x resolution x model; InvalidRequest above the largest resolution."""
    area = width * height
    bands = [band for band in table.resolution if area <= band.max_area]
    if not bands:
        largest = max(band.max_area for band in table.resolution)
        raise InvalidRequest("size", f"width x height must be at most {largest} pixels")
    resolution = Fraction(min(bands, key=lambda band: band.max_area).multiplier)
    model = Fraction(table.model[family])
    exact = table.base * num_frames * resolution * model
    return Quote(
        Credits(max(1, round_half_up(exact))), exact, table.base, num_frames, resolution, model
    )


def charge(exact: Fraction, reserved: Credits, share: Fraction) -> Credits:
    """What a share (0..1) of the planned work costs, never above the reservation."""
    return Credits(min(reserved, round_half_up(exact * share)))


def share_done(weights: WorkWeights, planned: Passes, done: Passes) -> Fraction:
    """Weighted work done over work planned, 0..1; a pass beyond the plan counts for nothing."""
    total = weighted = Fraction(0)
    for stage, weight in weights.model_dump().items():
        num_planned, num_done = getattr(planned, stage), getattr(done, stage)
        if num_planned == 0:
            continue
        total += weight
        weighted += weight * Fraction(min(num_done, num_planned), num_planned)
    return weighted / total if total else Fraction(0)


def round_half_up(value: Fraction) -> int:
    """The nearest integer, halves upwards."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
