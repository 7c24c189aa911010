"""Synthetic clips: one coloured shape on a plain background that moves through the frame.

The path passes the middle of the frame at mid-clip, so each motion word means one layout of the
clip; that is what lets a small model learn the word in minutes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HUES_DEG = {
    "red": 0.0,
    "orange": 30.0,
    "yellow": 55.0,
    "green": 120.0,
    "cyan": 180.0,
    "blue": 225.0,
    "purple": 280.0,
    # The more colours each shape and motion comes in, the less a model learns that one of them
    # never comes as a square.
    "lime": 88.0,
    "mint": 150.0,
    "azure": 202.0,
    "indigo": 252.0,
    "magenta": 305.0,
    "pink": 331.0,
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": (0.0, 0.0),
    "diagonal": (0.7071, 0.7071),
}
BACKGROUNDS = {"dark": 26, "light": 224}

SIZE = 64
NUM_FRAMES = 13
TRAVEL_PX = 24.0
SATURATION, VALUE = 0.92, 0.94


@dataclass(frozen=True, slots=True, order=True)
class Combination:
    """What a caption names about the moving shape."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True, slots=True)
class Clip:
    """pixels: uint8 [F, H, W, 3] RGB; alpha: float32 [F, H, W], the shape's coverage in 0..1."""

    pixels: NDArray[np.uint8]
    alpha: NDArray[np.float32]


def all_combinations() -> list[Combination]:
    """Every colour x shape x motion, in a fixed order."""
    return [Combination(c, s, m) for c in HUES_DEG for s in SHAPES for m in MOTIONS]


def is_held_out(combination: Combination) -> bool:
    """One combination in five never appears in training; each colour, shape and motion does."""
    index = (
        list(HUES_DEG).index(combination.colour)
        + SHAPES.index(combination.shape)
        + list(MOTIONS).index(combination.motion)
    )
    return index % 5 == 0


def hue_to_rgb(hue_deg: float) -> NDArray[np.float32]:
    """RGB in 0..255 of a hue at the clips' saturation and value."""
    offsets = (np.array([5.0, 3.0, 1.0]) + hue_deg / 60.0) % 6.0
    level = VALUE - VALUE * SATURATION * np.clip(np.minimum(offsets, 4.0 - offsets), 0.0, 1.0)
    return (255.0 * level).astype(np.float32)


def signed_distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius_px: float
) -> NDArray[np.floating[Any]]:
    """Distance in pixels to the edge of a shape centred on the origin, negative inside.

    All three shapes have the area of a circle of that radius; the triangle points up.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius_px
    if shape == "square":
        half = radius_px * math.sqrt(math.pi) / 2.0
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "triangle":
        side = 2.0 * radius_px * math.sqrt(math.pi / math.sqrt(3.0))
        inradius = side / (2.0 * math.sqrt(3.0))
        slope = math.sqrt(3.0) / 2.0
        return np.maximum(y - inradius, np.abs(x) * slope - y / 2.0 - inradius)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def draw_clip(combination: Combination, background: str, random: np.random.Generator) -> Clip:
    """One clip with jittered place, size, grey level and hue."""
    x, y = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32))
    middle = (SIZE - 1) / 2.0 + random.uniform(-1.5, 1.5, 2)
    radius_px = random.uniform(12.0, 12.8)
    step = np.array(MOTIONS[combination.motion]) * TRAVEL_PX / (NUM_FRAMES - 1)
    alpha = np.empty((NUM_FRAMES, SIZE, SIZE), np.float32)
    for frame in range(NUM_FRAMES):
        centre_x, centre_y = middle + step * (frame - (NUM_FRAMES - 1) / 2.0)
        distance = signed_distance(combination.shape, x - centre_x, y - centre_y, radius_px)
        alpha[frame] = np.clip(0.5 - distance, 0.0, 1.0)
    grey = BACKGROUNDS[background] + random.uniform(-6.0, 6.0)
    colour = hue_to_rgb(HUES_DEG[combination.colour] + random.uniform(-2.0, 2.0))
    pixels = grey * (1.0 - alpha[..., None]) + colour * alpha[..., None]
    return Clip(np.round(pixels).astype(np.uint8), alpha)
