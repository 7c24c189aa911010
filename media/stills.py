"""Pictures of a video, made while its frames go by: a thumbnail and a sheet of small frames."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 480
TILE_SIDE = 160
MAX_TILES = 25


class Stills:
    """Keeps the first frame, and up to 25 evenly spread ones made small, of num_frames frames."""

    def __init__(self, num_frames: int) -> None:
        self.num_tiles = min(num_frames, MAX_TILES)
        self.wanted = {index * num_frames // self.num_tiles for index in range(self.num_tiles)}
        self.seen = 0
        self.first: Image.Image | None = None
        self.tiles: list[Image.Image] = []

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """The next frames in order, uint8 [F, H, W, 3] RGB."""
        for frame in pixels:
            if self.seen == 0:
                self.first = _shrink(frame, THUMBNAIL_SIDE)
            if self.seen in self.wanted:
                self.tiles.append(_shrink(frame, TILE_SIDE))
            self.seen += 1

    def thumbnail(self) -> bytes:
        """The first frame as WebP, 480 pixels on its long side at most."""
        if self.first is None:
            raise ValueError("no frame was added")
        return _encode(self.first, "WEBP")

    def spritesheet(self) -> bytes:
        """The tiles in reading order, five in a row or fewer, as JPEG."""
        if not self.tiles:
            raise ValueError("no frame was added")
        width, height = self.tiles[0].size
        columns = math.ceil(math.sqrt(len(self.tiles)))
        rows = math.ceil(len(self.tiles) / columns)
        sheet = Image.new("RGB", (columns * width, rows * height))
        for index, tile in enumerate(self.tiles):
            sheet.paste(tile, (index % columns * width, index // columns * height))
        return _encode(sheet, "JPEG")


def _shrink(frame: NDArray[np.uint8], max_side: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((max_side, max_side))
    return image


def _encode(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, quality=85)
    return content.getvalue()
