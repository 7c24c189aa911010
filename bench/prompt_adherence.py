"""How often the demo model does what the prompt says, on seen and on held-out combinations.

An attribute counts only if it is right in every frame. Prompts are paraphrases, their background
named before, after or not at all; the measuring is classical image analysis
(`training.attributes`) on the decoded frames.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.machine import describe_machine
from models.catalog import load_model
from models.denoise import denoise
from models.stages import Decoder, Denoiser, Encoder, load_decoder, load_denoiser, load_encoder
from training.attributes import Score, score
from training.captions import paraphrase
from training.clips import (
    BACKGROUNDS,
    Combination,
    all_combinations,
    draw_clip,
    is_held_out,
)

ATTRIBUTES = ("colour", "motion", "shape")
CONTACT_FRAMES = (0, 4, 8, 12)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A paraphrase, what it asks for, and the seed of its video."""

    text: str
    combination: Combination
    background: str
    seed: int


class Generator:
    """The stages of a model in one process."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.encoder: Encoder[Any] = load_encoder(self.model)
        self.denoiser: Denoiser[Any] = load_denoiser(self.model)
        self.decoder: Decoder = load_decoder(self.model)

    def generate(
        self, prompt: Prompt, *, f_patch_size: int, start_image: bytes | None = None
    ) -> NDArray[np.uint8]:
        """uint8 [F, H, W, 3]."""
        request = self.model.resolve(
            {"prompt": prompt.text, "seed": prompt.seed, "f_patch_size": f_patch_size}
        )
        conditioning = self.encoder.encode(request, start_image)
        *_, last = denoise(self.denoiser, request, conditioning)
        latents = last.latents.cpu().numpy()
        chunks = [frames.pixels for frames in self.decoder.decode(request, latents)]
        return np.concatenate(chunks)


def make_prompts(held_out: bool, count: int, seed: int) -> list[Prompt]:
    """Paraphrases that go round all combinations of the split in a fixed random order."""
    chance = random.Random(f"adherence-{seed}-{held_out}")
    combinations = [c for c in all_combinations() if is_held_out(c) == held_out]
    chance.shuffle(combinations)
    prompts = []
    for index in range(count):
        combination = combinations[index % len(combinations)]
        background = chance.choice(list(BACKGROUNDS))
        text = paraphrase(combination, background, chance)
        prompts.append(Prompt(text, combination, background, seed=1000 + index))
    return prompts


def start_frame(prompt: Prompt) -> bytes:
    """The first frame of a clip of what is asked, as PNG."""
    clip = draw_clip(prompt.combination, prompt.background, np.random.default_rng(prompt.seed))
    return png(clip.pixels[0])


def png(pixels: NDArray[np.uint8]) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def measure(
    generator: Generator, prompts: Sequence[Prompt], f_patch_size: int, *, from_image: bool
) -> tuple[dict[str, float], list[NDArray[np.uint8]], list[Score]]:
    """Shares of right attributes, the videos, and each video's score."""
    videos, scores = [], []
    for prompt in prompts:
        image = start_frame(prompt) if from_image else None
        pixels = generator.generate(prompt, f_patch_size=f_patch_size, start_image=image)
        wanted = prompt.combination
        videos.append(pixels)
        scores.append(score(pixels, wanted.colour, wanted.shape, wanted.motion))
    shares = {
        name: round(sum(getattr(found, name) for found in scores) / len(scores), 4)
        for name in ATTRIBUTES
    }
    return shares, videos, scores


def contact_sheet(videos: Sequence[NDArray[np.uint8]], scores: Sequence[Score]) -> Image.Image:
    """A row of four frames a video, three videos across; a red edge marks a miss."""
    rows = []
    for video, found in zip(videos, scores, strict=True):
        strip = np.concatenate([video[frame] for frame in CONTACT_FRAMES], axis=1)
        missed = not (found.colour and found.shape and found.motion)
        edge = np.array([220, 0, 0] if missed else [60, 60, 60], np.uint8)
        framed = np.empty((strip.shape[0] + 4, strip.shape[1] + 4, 3), np.uint8)
        framed[:] = edge
        framed[2:-2, 2:-2] = strip
        rows.append(framed)
    while len(rows) % 3:
        rows.append(np.zeros_like(rows[0]))
    lines = [np.concatenate(rows[i : i + 3], axis=1) for i in range(0, len(rows), 3)]
    return Image.fromarray(np.concatenate(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_adherence", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--prompts", type=int, default=125, help="a split and temporal patch size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, default=Path("out/prompt_adherence.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(describe_machine())
    generator = Generator(arguments.model)
    prompts = {
        split: make_prompts(split == "heldout", arguments.prompts, arguments.seed)
        for split in ("heldout", "seen")
    }
    tables: dict[tuple[str, str], dict[str, float]] = {}
    started_s = time.monotonic()
    header = "".join(f"{name:>9}" for name in ATTRIBUTES)
    print(f"{'':24}{header}   ({arguments.prompts} prompts each, right in every frame)")
    for split in ("heldout", "seen"):
        for f_patch_size in generator.model.spec.f_patch_sizes:
            shares, videos, scores = measure(
                generator, prompts[split], f_patch_size, from_image=False
            )
            tables[split, str(f_patch_size)] = shares
            _print_row(f"{split}, f_patch {f_patch_size}", shares)
            if split == "heldout" and f_patch_size == 1:
                arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
                contact_sheet(videos[:36], scores[:36]).save(arguments.sheet)
                _print_misses(prompts[split], scores)
    image_to_video, videos, scores = measure(generator, prompts["heldout"], 1, from_image=True)
    _print_row("image-to-video, heldout", image_to_video)
    sheet = arguments.sheet.with_name(f"{arguments.sheet.stem}_image.png")
    contact_sheet(videos[:36], scores[:36]).save(sheet)
    print(f"contact sheets: {arguments.sheet}, {sheet}; {time.monotonic() - started_s:.0f} s")
    result: dict[str, Any] = {
        split: {name: min(tables[split, f][name] for f in ("1", "2")) for name in ATTRIBUTES}
        for split in ("heldout", "seen")
    }
    result["per_f_patch"] = {f: tables["heldout", f] for f in ("1", "2", "4")}
    result["image_to_video"] = image_to_video
    result["prompts"] = arguments.prompts
    print(json.dumps(result))


def _print_row(name: str, shares: dict[str, float]) -> None:
    print(f"{name:24}" + "".join(f"{shares[a]:9.1%}" for a in ATTRIBUTES), flush=True)


def _print_misses(prompts: Sequence[Prompt], scores: Sequence[Score]) -> None:
    for prompt, found in zip(prompts, scores, strict=True):
        missed = [name for name in ATTRIBUTES if not getattr(found, name)]
        if missed:
            print(f"    missed {', '.join(missed)}: {prompt.text!r}")


if __name__ == "__main__":
    main()
