"""Captions for the synthetic clips: one canonical phrasing and a grammar of paraphrases."""

import random

from training.clips import Combination

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc", "dot", "round shape"),
    "square": ("square", "box", "block", "cube"),
    "triangle": ("triangle", "triangular shape", "triangle shape"),
}
MOVING = ("moving", "going", "sliding", "flying", "travelling", "traveling", "drifting", "gliding")
MOVES = ("moves", "goes", "slides", "flies", "travels", "drifts", "is moving", "is going")
DIRECTIONS = {
    "left": ("left", "to the left", "leftwards", "leftward", "from right to left",
             "towards the left", "toward the left"),
    "right": ("right", "to the right", "rightwards", "rightward", "from left to right",
              "towards the right", "toward the right"),
    "up": ("up", "upwards", "upward", "from bottom to top", "to the top", "towards the top"),
    "down": ("down", "downwards", "downward", "from top to bottom", "to the bottom",
             "towards the bottom"),
    "diagonal": ("diagonally", "diagonal", "along the diagonal", "diagonally down",
                 "in a diagonal", "down and to the right"),
}  # fmt: skip
STILL = (
    "standing still", "not moving", "at rest", "still", "staying still", "staying in place",
    "that does not move", "motionless", "stationary", "that stands still", "is still",
    "is not moving", "resting", "is at rest",
)  # fmt: skip
BACKGROUND_WORDS = {
    "dark": ("dark", "black", "dark grey"),
    "light": ("light", "white", "bright"),
}


def canonical(combination: Combination, background: str | None = None) -> str:
    """`a red circle moving right on a dark background`; the background only when named."""
    motion = {"still": "standing still", "diagonal": "moving diagonally"}.get(
        combination.motion, f"moving {combination.motion}"
    )
    text = f"a {combination.colour} {combination.shape} {motion}"
    return text if background is None else f"{text} on a {background} background"


def paraphrase(combination: Combination, background: str, chance: random.Random) -> str:
    """One of several thousand phrasings; two in three name the background, before or after."""
    subject = " ".join(
        word
        for word in (
            chance.choice(("a", "a", "the", "one", "")),
            combination.colour,
            chance.choice((combination.shape, *SHAPE_WORDS[combination.shape])),
        )
        if word
    )
    text = f"{subject} {_motion_words(combination.motion, chance)}"
    place = chance.choice(("before", "after", "unnamed"))
    if place == "unnamed":
        return text
    backdrop = (
        f"{chance.choice(('on a', 'against a', 'over a', 'on the', 'with a'))} "
        f"{chance.choice(BACKGROUND_WORDS[background])} background"
    )
    if place == "after":
        return f"{text}{chance.choice(('', ','))} {backdrop}"
    return f"{chance.choice((backdrop, backdrop.split(' ', 2)[2]))}, {text}"


def colour_alone(combination: Combination, chance: random.Random) -> str:
    """`a red shape`: for videos whose shape and motion something else tells."""
    return f"{chance.choice(('a', 'a', 'the', 'one'))} {combination.colour} shape"


def _motion_words(motion: str, chance: random.Random) -> str:
    if motion == "still":
        return chance.choice(STILL)
    verb = chance.choice(MOVING + MOVES if chance.random() < 0.8 else ("",))
    return f"{verb} {chance.choice(DIRECTIONS[motion])}".strip()
