"""How often the demo model does as it is told in other ways than by one text: what it makes of a
remix, of an extension, of outlines that lead it, and of words for a half of the frame.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bench.generator import ATTRIBUTES, Generator, Prompt, png, share_of
from deployments.remix import kept_fields
from deployments.request_body import CreateBody
from media.edges import find_edges
from training.attributes import (
    Score,
    foreground,
    read_attributes,
    score,
)
from training.captions import colour_alone, paraphrase
from training.clips import HUES_DEG, SIZE, Combination, draw_clip
from training.train_regions import TwoShapes, choose_two_shapes

Pixels = NDArray[np.uint8]
BACK = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}
LEAST_OVERLAP = 0.75


class Tally:
    """The scores of a mode, its videos, and what else is measured of them."""

    def __init__(self) -> None:
        self.scores: list[Score] = []
        self.videos: list[Pixels] = []
        self.others: dict[str, list[bool]] = {}

    def add(self, pixels: Pixels, found: Score, **others: bool) -> None:
        """One video."""
        self.videos.append(pixels)
        self.scores.append(found)
        for name, right in others.items():
            self.others.setdefault(name, []).append(right)

    @property
    def shares(self) -> dict[str, float]:
        """Of what is right in every frame."""
        shares = {name: share_of(getattr(s, name) for s in self.scores) for name in ATTRIBUTES}
        return shares | {name: share_of(right) for name, right in self.others.items()}


def score_of(pixels: Pixels, wanted: Combination) -> Score:
    """Against what it should show."""
    return score(pixels, wanted.colour, wanted.shape, wanted.motion)


def remix(generator: Generator, prompts: Sequence[Prompt], chance: random.Random) -> Tally:
    """Each video anew in another colour: as `POST /v1/videos/{id}/remix` keeps and replaces."""
    tally = Tally()
    for prompt in prompts:
        former = generator.model.resolve({"prompt": prompt.text, "seed": prompt.seed})
        others = [colour for colour in HUES_DEG if colour != prompt.combination.colour]
        wanted = replace(prompt.combination, colour=chance.choice(others))
        words = paraphrase(wanted, prompt.background, chance)
        body = CreateBody(None, {"prompt": words})
        kept = kept_fields(former, generator.model.id, body)
        pixels = generator.make({**kept, "prompt": words}).pixels
        tally.add(pixels, score_of(pixels, wanted))
    return tally


def extension(generator: Generator, prompts: Sequence[Prompt], chance: random.Random) -> Tally:
    """From the last frame of each video on, the way back, before the background that it has."""
    tally = Tally()
    for prompt in prompts:
        if prompt.combination.motion not in BACK:
            continue
        first = generator.make({"prompt": prompt.text, "seed": prompt.seed}).pixels
        wanted = replace(prompt.combination, motion=BACK[prompt.combination.motion])
        words = paraphrase(wanted, read_attributes(first).background, chance)
        fields = {"prompt": words, "seed": prompt.seed + 1}
        pixels = generator.make(fields, start_image=png(first[-1])).pixels
        tally.add(pixels, score_of(pixels, wanted))
    return tally


def control(
    generator: Generator,
    prompts: Sequence[Prompt],
    chance: random.Random,
    *,
    f_patch_size: int = 1,
    scale: float = 1.0,
) -> Tally:
    """Words tell of the colour alone; shape and motion are those of the edges of a clip.

    overlap: of videos whose shape fills its outline in every frame.
    """
    tally = Tally()
    for prompt in prompts:
        clip = draw_clip(prompt.combination, prompt.background, np.random.default_rng(prompt.seed))
        fields = {
            "prompt": colour_alone(prompt.combination, chance),
            "seed": prompt.seed,
            "f_patch_size": f_patch_size,
            "control": {"type": "canny", "scale": scale},
        }
        pixels = generator.make(fields, control=find_edges(clip.pixels)).pixels
        overlap = _overlaps(pixels, clip.alpha > 0.5)
        tally.add(pixels, score_of(pixels, prompt.combination), overlap=overlap)
    return tally


def regions(
    generator: Generator,
    count: int,
    *,
    with_lora: bool = True,
    told: Callable[[TwoShapes], TwoShapes] = lambda two: two,
) -> Tally:
    """A shape in each half of a wide frame, one by the prompt and one by the words of a region.

    What is right has to be so in both halves. told: what is said, if not what is measured.
    """
    chance = random.Random("adherence-regions")
    tally = Tally()
    for index in range(count):
        two = choose_two_shapes(chance, held_out=True)
        said = told(two)
        fields = {
            "prompt": said.captions[0],
            "seed": 1000 + index,
            "width": 2 * SIZE,
            "height": SIZE,
            "regions": [{"prompt": said.captions[1], "box": said.box}],
            "loras": [{"name": "regions"}] if with_lora else [],
        }
        pixels = generator.make(fields).pixels
        halves = np.split(pixels, 2, axis=2)
        left, right = map(score_of, halves, (two.left, two.right))
        both = Score(
            colour=left.colour and right.colour,
            shape=left.shape and right.shape,
            motion=left.motion and right.motion,
        )
        tally.add(pixels, both)
    return tally


def exchanged(two: TwoShapes) -> TwoShapes:
    """Each half's words for the other: what must not be taken for right."""
    return replace(two, left=two.right, right=two.left)


def _overlaps(pixels: Pixels, wanted: NDArray[np.bool_]) -> bool:
    """Whether the shape in every frame is where the clip's is: by intersection over union."""
    for frame, mask in zip(pixels, wanted, strict=True):
        found = foreground(frame)
        if (found & mask).sum() < LEAST_OVERLAP * (found | mask).sum():
            return False
    return True
