"""Start images: decoded in a child process, fitted to the frame that was asked for."""

import io
import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from models.request import InvalidRequest

logger = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("image_child.py")


class ImageLimits(BaseModel, frozen=True, extra="forbid"):
    """What decoding one image may take; the child that exceeds it ends, and nothing else does."""

    max_pixels: int = Field(24_000_000, ge=256)
    max_memory_bytes: int = Field(1 << 30, ge=1 << 27)
    max_cpu_s: int = Field(10, ge=1)


@dataclass(frozen=True, slots=True)
class StartImage:
    """A PNG of just the frame's size, and width and height of what it was fitted from."""

    png: bytes
    size: tuple[int, int]

    @property
    def aspect(self) -> float:
        """Width over height of what it was fitted from."""
        return self.size[0] / self.size[1]


@dataclass(frozen=True, slots=True)
class CropBox:
    """The part of an image to use, in pixels from its left upper corner."""

    x: int
    y: int
    width: int
    height: int


def prepare_start_image(
    content: bytes,
    *,
    size: tuple[int, int],
    crop: CropBox | None,
    limits: ImageLimits,
    param: str,
) -> StartImage:
    """Decode, turn upright, crop, and cover `size` (width, height), keeping the middle.

    InvalidRequest naming param, or crop, for what can't be read within the limits.
    """
    settings = {
        **limits.model_dump(),
        "size": size,
        "crop": None if crop is None else [crop.x, crop.y, crop.width, crop.height],
    }
    # -I: the child imports nothing that lies where the server runs.
    command = [sys.executable, "-I", str(CHILD), json.dumps(settings)]
    try:
        child = subprocess.run(
            command, input=content, capture_output=True, timeout=3.0 * limits.max_cpu_s
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(param, f"{param} takes too long to read") from error
    if child.returncode == 2:
        fault = json.loads(child.stderr)
        at_fault = "crop" if fault["crop"] else param
        raise InvalidRequest(at_fault, f"{param} {fault['message']}")
    if child.returncode != 0:  # killed by its limits, out of memory, or by a fault of Pillow's
        said = child.stderr.decode(errors="replace")[-2000:]
        logger.warning("an image's child ended with %d: %s", child.returncode, said)
        raise InvalidRequest(param, f"{param} takes more memory or time than an image may")
    head, _, png = child.stdout.partition(b"\n")
    found = json.loads(head)
    return StartImage(png, (found["width"], found["height"]))


def decode_png(png: bytes) -> NDArray[np.uint8]:
    """A prepared image as uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def padded_image(png: bytes, *, generated_size: tuple[int, int]) -> Image.Image:
    """A prepared image at generated_size (width, height).

    Its edge repeats outwards, so that the trim after decoding gives the image back.
    """
    pixels = decode_png(png)
    return Image.fromarray(pad_pixels(pixels[None], generated_size)[0])


def pad_start_image(png: bytes, *, generated_size: tuple[int, int]) -> NDArray[np.float32]:
    """A prepared image, padded, as float32 [3, H, W] in -1..1."""
    pixels = np.asarray(padded_image(png, generated_size=generated_size))
    return pad_frames(pixels[None], generated_size=generated_size)[:, 0]


def pad_frames(
    frames: NDArray[np.uint8], *, generated_size: tuple[int, int]
) -> NDArray[np.float32]:
    """uint8 [F, H, W, 3] -> float32 [3, F, H', W'] in -1..1, the edges repeated outwards.

    Rounded as diffusers' `VaeImageProcessor` does.
    """
    padded = pad_pixels(frames, generated_size)
    return np.ascontiguousarray(padded.transpose(3, 0, 1, 2), np.float32) / 255.0 * 2.0 - 1.0


def pad_pixels(frames: NDArray[np.uint8], generated_size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [F, H, W, 3] -> [F, H', W', 3], the edges repeated outwards."""
    _, height, width, _ = frames.shape
    extra_x, extra_y = generated_size[0] - width, generated_size[1] - height
    around = (
        (0, 0),
        (extra_y // 2, extra_y - extra_y // 2),
        (extra_x // 2, extra_x - extra_x // 2),
        (0, 0),
    )
    return np.pad(frames, around, mode="edge")
