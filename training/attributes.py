"""Reads colour, shape and motion off a clip by classical image analysis, frame by frame."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.clips import HUES_DEG, MOTIONS, SHAPES, signed_distance

FOREGROUND_DIFFERENCE = 0.22
MIN_AREA, MAX_AREA = 0.006, 0.4
MIN_TRAVEL, STILL_TRAVEL = 0.3, 0.08
MAX_OFF_TRACK = 0.06
MAX_HUE_ERROR_DEG, MIN_SATURATION = 8.0, 0.3
MIN_OVERLAP = 0.75


@dataclass(frozen=True, slots=True)
class Attributes:
    """What each frame shows; None in a frame where no single shape stands out.

    motion is one for the clip: the direction of the centroid's straight track, or None if any
    frame leaves the track by more than 6 % of the frame or the travel is neither one nor rest.
    """

    colours: tuple[str | None, ...]
    shapes: tuple[str | None, ...]
    motion: str | None
    background: str


@dataclass(frozen=True, slots=True)
class Score:
    """Which of the asked attributes are right in every frame."""

    colour: bool
    shape: bool
    motion: bool


def read_attributes(pixels: NDArray[np.uint8]) -> Attributes:
    """pixels: uint8 [F, H, W, 3] RGB."""
    video = pixels.astype(np.float32) / 255.0
    masks = [foreground(frame) for frame in pixels]
    visible = [MIN_AREA < mask.mean() < MAX_AREA for mask in masks]
    border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
    return Attributes(
        colours=tuple(
            _colour(frame, mask) if seen else None
            for frame, mask, seen in zip(pixels, masks, visible, strict=True)
        ),
        shapes=tuple(
            _shape(mask) if seen else None for mask, seen in zip(masks, visible, strict=True)
        ),
        motion=_motion(masks) if all(visible) else None,
        background="light" if float(np.median(border)) > 0.5 else "dark",
    )


def score(pixels: NDArray[np.uint8], colour: str, shape: str, motion: str) -> Score:
    """An attribute counts only if it is right in every frame, the first one included."""
    seen = read_attributes(pixels)
    return Score(
        colour=all(found == colour for found in seen.colours),
        shape=all(found == shape for found in seen.shapes),
        motion=seen.motion == motion,
    )


def foreground(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """bool [H, W]: where a frame uint8 [H, W, 3] differs from its border."""
    frame = pixels.astype(np.float32) / 255.0
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    difference = np.abs(frame - np.median(border, axis=0)).max(axis=-1)
    return np.asarray(difference > FOREGROUND_DIFFERENCE)


def _colour(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> str | None:
    """The named hue within 8 degrees of the shape's median colour, unless that is near grey."""
    red, green, blue = median = np.median(pixels[mask].astype(np.float32) / 255.0, axis=0)
    if median.max() - median.min() < MIN_SATURATION * median.max():
        return None
    hue_deg = np.rad2deg(np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue))
    for name, named_deg in HUES_DEG.items():
        if abs((hue_deg - named_deg + 180.0) % 360.0 - 180.0) <= MAX_HUE_ERROR_DEG:
            return name
    return None


def _centroid(mask: NDArray[np.bool_]) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def _shape(mask: NDArray[np.bool_]) -> str | None:
    """The template of equal area and best overlap, its centre searched within a pixel.

    None if even that one overlaps by less than 0.75 (intersection over union).
    """
    centre_x, centre_y = _centroid(mask)
    radius_px = float(np.sqrt(mask.sum() / np.pi))
    x, y = np.meshgrid(
        np.arange(mask.shape[1], dtype=np.float32), np.arange(mask.shape[0], dtype=np.float32)
    )
    overlap = dict.fromkeys(SHAPES, 0.0)
    for shape in SHAPES:
        for shift_x in (-1.0, 0.0, 1.0):
            for shift_y in (-1.0, 0.0, 1.0):
                template = (
                    signed_distance(
                        shape, x - centre_x - shift_x, y - centre_y - shift_y, radius_px
                    )
                    < 0.0
                )
                both = np.logical_and(mask, template).sum() / np.logical_or(mask, template).sum()
                overlap[shape] = max(overlap[shape], float(both))
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] >= MIN_OVERLAP else None


def _motion(masks: list[NDArray[np.bool_]]) -> str | None:
    size = np.array([masks[0].shape[1], masks[0].shape[0]], np.float64)
    track = np.array([_centroid(mask) for mask in masks]) / size
    time = np.arange(len(masks)) - (len(masks) - 1) / 2.0
    slope = (time[:, None] * track).sum(axis=0) / (time**2).sum()
    off_track = np.abs(track - track.mean(axis=0) - time[:, None] * slope).max()
    if off_track > MAX_OFF_TRACK:
        return None
    travel = slope * (len(masks) - 1)
    distance = float(np.hypot(*travel))
    if distance < STILL_TRAVEL:
        return "still"
    if distance < MIN_TRAVEL:
        return None
    angle = np.arctan2(travel[1], travel[0])
    for name, (x, y) in MOTIONS.items():
        turn = (angle - np.arctan2(y, x) + np.pi) % (2.0 * np.pi) - np.pi
        if name != "still" and abs(turn) <= np.pi / 8.0:
            return name
    return None
