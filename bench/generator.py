"""Videos of the demo model, made in one process, and the prompts that they are asked for by."""

import io
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.catalog import load_model
from models.control import load_control_net
from models.denoise import denoise
from models.lora import load_lora
from models.request import ControlKind
from models.stages import Decoder, Denoiser, load_decoder, load_denoiser, load_encoder
from training.captions import paraphrase
from training.clips import BACKGROUNDS, Combination, all_combinations, draw_clip, is_held_out

ATTRIBUTES = ("colour", "motion", "shape")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A paraphrase, what it asks for, and the seed of its video."""

    text: str
    combination: Combination
    background: str
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """Of a request."""
        return {"prompt": self.text, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class MadeVideo:
    """Its frames uint8 [F, H, W, 3], and the passes of the model that were planned and skipped."""

    pixels: NDArray[np.uint8]
    planned: int
    skipped: int


class Generator:
    """The stages of a model in one process."""

    def __init__(self, folder: Path, guidance_scale: float | None = None) -> None:
        """With its control network and its LoRAs, if there are any. guidance_scale: of all
        videos, None: the model's default.
        """
        self.guidance_scale = guidance_scale
        controls, loras = folder / "control", sorted((folder / "loras").glob("*.safetensors"))
        self.model = replace(
            load_model(folder),
            controls=(
                (load_control_net(controls, "outlines", (ControlKind.CANNY,)),)
                if controls.is_dir()
                else ()
            ),
            loras=tuple(load_lora(path, path.stem) for path in loras),
        )
        self.encoder: Any = load_encoder(self.model)
        self.denoiser: Denoiser[Any] = load_denoiser(self.model)
        self.decoder: Decoder = load_decoder(self.model)

    def make(
        self,
        fields: dict[str, Any],
        start_image: bytes | None = None,
        control: NDArray[np.uint8] | None = None,
    ) -> MadeVideo:
        """A video of the request's fields; control: pictures [F, H, W, 3] that lead it."""
        if self.guidance_scale is not None:
            fields = {"guidance_scale": self.guidance_scale, **fields}
        request = self.model.resolve(fields)
        conditioning = self.encoder.encode(request, start_image)
        if control is not None:
            conditioning = replace(
                conditioning, control=self.encoder.encode_control(request, control)
            )
        *_, last = denoise(self.denoiser, request, conditioning)
        latents = last.latents.cpu().numpy()
        chunks = [frames.pixels for frames in self.decoder.decode(request, latents)]
        return MadeVideo(np.concatenate(chunks), request.planned_passes, last.skipped)


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
    """Of a frame."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def share_of(right: Iterable[bool]) -> float:
    """Of those that are."""
    return round(float(np.mean(list(right))), 4)
