"""Decoding in tiles that any process may make: where they lie, and how they are joined.

The tiles and the blending are those of diffusers' `AutoencoderKLWan.tiled_decode`, frame by frame
and in numpy, so that whoever joins needs neither torch nor the VAE, and the result is the same to
the bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.catalog import Model
from models.request import VideoRequest
from models.tensors import Frames

Pixels = NDArray[np.float32]
TILE_SIDE, TILE_STRIDE = 256, 192  # AutoencoderKLWan's own


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of latents."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Latents of height by width, in overlapping squares; scale is pixels a latent.

    patch: a VAE may decode to patches of so many pixels squared, each a run of channels; those are
    blended before they are spread.
    """

    height: int
    width: int
    scale: int
    patch: int = 1

    @property
    def boxes(self) -> list[Box]:
        """Row by row; those at the lower and right edges may be smaller."""
        side, stride = TILE_SIDE // self.scale, TILE_STRIDE // self.scale
        return [
            Box(top, left, min(side, self.height - top), min(side, self.width - left))
            for top in range(0, self.height, stride)
            for left in range(0, self.width, stride)
        ]

    def join(self, tiles: Sequence[Pixels]) -> Pixels:
        """Decoded tiles [3 * patch**2, F, h, w], in the order of boxes, to frames [3, F, H, W].

        Every tile is blended with the one above and the one to its left, after those were.
        """
        columns = len(range(0, self.width, TILE_STRIDE // self.scale))
        stride = TILE_STRIDE // self.patch
        overlap = TILE_SIDE // self.patch - stride
        blended = [tile.copy() for tile in tiles]
        rows = []
        for first in range(0, len(blended), columns):
            row = blended[first : first + columns]
            for column, tile in enumerate(row):
                if first:
                    above = blended[first - columns + column]
                    _blend(above.swapaxes(2, 3), tile.swapaxes(2, 3), overlap)
                if column:
                    _blend(row[column - 1], tile, overlap)
            rows.append(np.concatenate([t[..., :stride, :stride] for t in row], axis=3))
        scale = self.scale // self.patch
        joined = np.concatenate(rows, axis=2)[:, :, : self.height * scale, : self.width * scale]
        return self._spread(joined)

    def _spread(self, patches: Pixels) -> Pixels:
        """diffusers' `unpatchify`: channels are colour, then column, then row of the patch."""
        channels, frames, height, width = patches.shape
        side = self.patch
        split = patches.reshape(channels // side**2, side, side, frames, height, width)
        return split.transpose(0, 3, 4, 2, 5, 1).reshape(-1, frames, height * side, width * side)


def tile_grid(model: Model, request: VideoRequest) -> TileGrid:
    """The tiles of a request's frames."""
    _, height, width = model.spec.latent_size(request)
    return TileGrid(height, width, model.spec.latent_scale, model.spec.pixel_patch)


def chunk_starts(model: Model, request: VideoRequest) -> range:
    """Of the runs of decode_chunk_frames that hold the frames that are asked for."""
    return range(0, request.num_frames, model.manifest.decode_chunk_frames)


def chunk_of(model: Model, latents: Pixels, start: int) -> Pixels:
    """The latents [1, C, F, h, w] of one of these runs; the last one may be shorter."""
    return latents[:, :, start : start + model.manifest.decode_chunk_frames]


def stream_frames(
    chunks: Iterable[Pixels], request: VideoRequest, dropped: int = 0
) -> Iterator[Frames]:
    """Runs of decoded frames, [3, F, H, W] about -1..1 in temporal order, cut to what was asked.

    dropped: frames before the first. Nothing is decoded after the last.
    """
    remaining = request.num_frames
    for chunk in chunks:
        skipped = min(dropped, chunk.shape[1])
        dropped -= skipped
        frames = to_frames(chunk[:, skipped:][:, :remaining], request)
        remaining -= len(frames.pixels)
        if len(frames.pixels):
            yield frames
        if remaining <= 0:
            return


def to_frames(pixels: Pixels, request: VideoRequest) -> Frames:
    """[3, F, H, W] about -1..1 to the request's size, cut from the middle."""
    top = (pixels.shape[2] - request.height) // 2
    left = (pixels.shape[3] - request.width) // 2
    cut = pixels[:, :, top : top + request.height, left : left + request.width].clip(-1.0, 1.0)
    rounded = np.rint((cut + np.float32(1.0)) * np.float32(127.5)).astype(np.uint8)
    return Frames(np.ascontiguousarray(rounded.transpose(1, 2, 3, 0)), request.fps)


def _blend(before: Pixels, after: Pixels, overlap: int) -> None:
    """Fade the first columns of `after` in over the last ones of `before`, in place."""
    extent = min(before.shape[3], after.shape[3], overlap)
    for x in range(extent):
        share = x / extent
        after[..., x] = before[..., x - extent] * (1 - share) + after[..., x] * share
