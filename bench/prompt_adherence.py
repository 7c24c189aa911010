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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import adherence_modes as modes
from bench.generator import ATTRIBUTES, Generator, Prompt, make_prompts, share_of, start_frame
from bench.machine import describe_machine
from training.attributes import Score, score

CONTACT_FRAMES = (0, 4, 8, 12)


def measure(
    generator: Generator, prompts: Sequence[Prompt], f_patch_size: int, *, from_image: bool
) -> tuple[dict[str, float], list[NDArray[np.uint8]], list[Score]]:
    """Shares of right attributes, the videos, and each video's score."""
    videos, scores = [], []
    for prompt in prompts:
        image = start_frame(prompt) if from_image else None
        pixels = generator.make({**prompt.fields, "f_patch_size": f_patch_size}, image).pixels
        wanted = prompt.combination
        videos.append(pixels)
        scores.append(score(pixels, wanted.colour, wanted.shape, wanted.motion))
    shares = {name: share_of(getattr(found, name) for found in scores) for name in ATTRIBUTES}
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
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, default=Path("out/prompt_adherence.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(describe_machine())
    generator = Generator(arguments.model, arguments.guidance)
    sheets = Sheets(arguments.sheet)
    started_s = time.monotonic()
    prompts = {
        split: make_prompts(split == "heldout", arguments.prompts, arguments.seed)
        for split in ("heldout", "seen")
    }
    header = "".join(f"{name:>9}" for name in ATTRIBUTES)
    print(f"{'':30}{header}   ({arguments.prompts} prompts each, right in every frame)")
    result = measure_texts(generator, prompts, sheets)
    result |= measure_modes(generator, prompts["heldout"], sheets)
    print(f"contact sheets: {', '.join(sheets.written)}; {time.monotonic() - started_s:.0f} s")
    print(json.dumps({**result, "prompts": arguments.prompts}))


class Sheets:
    """Where contact sheets are written to, one for each name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[str] = []

    def write(
        self, name: str, videos: Sequence[NDArray[np.uint8]], scores: Sequence[Score]
    ) -> None:
        """The first 36."""
        path = self.path.with_name(f"{self.path.stem}{name}{self.path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(videos[:36], scores[:36]).save(path)
        self.written.append(str(path))


def measure_texts(
    generator: Generator, prompts: dict[str, list[Prompt]], sheets: Sheets
) -> dict[str, Any]:
    """Words alone, for each split and temporal patch size; and a start image."""
    tables: dict[tuple[str, str], dict[str, float]] = {}
    for split in ("heldout", "seen"):
        for f_patch_size in generator.model.spec.f_patch_sizes:
            shares, videos, scores = measure(
                generator, prompts[split], f_patch_size, from_image=False
            )
            tables[split, str(f_patch_size)] = shares
            _print_row(f"{split}, f_patch {f_patch_size}", shares)
            if split == "heldout" and f_patch_size == 1:
                sheets.write("", videos, scores)
                _print_misses(prompts[split], scores)
    image_to_video, videos, scores = measure(generator, prompts["heldout"], 1, from_image=True)
    _print_row("image-to-video, heldout", image_to_video)
    sheets.write("_image", videos, scores)
    lesser = {
        split: {name: min(tables[split, f][name] for f in ("1", "2")) for name in ATTRIBUTES}
        for split in ("heldout", "seen")
    }
    per_f_patch = {f: tables["heldout", f] for f in ("1", "2", "4")}
    return {**lesser, "per_f_patch": per_f_patch, "image_to_video": image_to_video}


def measure_modes(
    generator: Generator, prompts: Sequence[Prompt], sheets: Sheets
) -> dict[str, Any]:
    """Remix and extension; control and regions as far as the model has what they need, each beside
    the same without it.
    """
    chance = random.Random("adherence-modes")
    tallies = {
        "remix": modes.remix(generator, prompts, chance),
        "extension": modes.extension(generator, prompts, chance),
    }
    if generator.model.controls:
        for f_patch_size in generator.model.spec.f_patch_sizes:
            tallies[f"control, f_patch {f_patch_size}"] = modes.control(
                generator, prompts, chance, f_patch_size=f_patch_size
            )
        tallies["control of scale 0"] = modes.control(generator, prompts, chance, scale=0.0)
    found: dict[str, Any] = {}
    for name, tally in tallies.items():
        found[name] = tally.shares
        _print_row(f"{name}, heldout", tally.shares)
        if name in ("remix", "extension", "control, f_patch 1"):
            sheets.write(f"_{name.split(',')[0]}", tally.videos, tally.scores)
    if generator.model.loras:
        variants: dict[str, dict[str, Any]] = {
            "regions": {},
            "regions, words exchanged": {"told": modes.exchanged},
            "regions without the LoRA": {"with_lora": False},
        }
        for name, ways in variants.items():
            tally = modes.regions(generator, len(prompts), **ways)
            found[name] = tally.shares
            _print_row(f"{name}, heldout", tally.shares)
            if not ways:
                sheets.write("_regions", tally.videos, tally.scores)
    return found


def _print_row(name: str, shares: dict[str, float]) -> None:
    named = "".join(f"{shares[name]:9.1%}" for name in ATTRIBUTES if name in shares)
    more = "".join(f"  {key} {share:.1%}" for key, share in shares.items() if key not in ATTRIBUTES)
    print(f"{name:30}{named}{more}", flush=True)


def _print_misses(prompts: Sequence[Prompt], scores: Sequence[Score]) -> None:
    for prompt, found in zip(prompts, scores, strict=True):
        missed = [name for name in ATTRIBUTES if not getattr(found, name)]
        if missed:
            print(f"    missed {', '.join(missed)}: {prompt.text!r}")


if __name__ == "__main__":
    main()
