"""Tiles that are decoded apart and joined without torch are diffusers' tiled decode."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.catalog import Model
from models.request import VideoRequest
from models.tiles import TileGrid, tile_grid, to_frames
from models.z_image_video import ZImageVideoDecoder


def random_latents(grid: TileGrid, num_frames: int) -> NDArray[np.float32]:
    shape = (1, 8, num_frames, grid.height, grid.width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", [(272, 208), (208, 272)])
def test_joined_tiles_are_bit_equal_to_the_stock_tiled_decode(
    model: Model, a_request: Callable[..., VideoRequest], size: tuple[int, int]
) -> None:
    request = a_request(width=size[0], height=size[1], num_frames=5)
    grid = tile_grid(model, request)
    latents = random_latents(grid, 2)
    decoder = ZImageVideoDecoder(model)
    tiles = [decoder.decode_tile(latents, box) for box in grid.boxes]
    assert len(tiles) > 1
    joined = grid.join(tiles)

    vae: Any = decoder.vae
    vae = vae.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.inference_mode():
        vae.enable_tiling()
        stock = vae.decode(torch.tensor(latents) * deviation + mean).sample[0].numpy()
    np.testing.assert_array_equal(joined.clip(-1, 1), stock)

    spoilt = [tiles[0], tiles[1] + np.float32(1e-3), *tiles[2:]]
    assert not np.array_equal(grid.join(spoilt).clip(-1, 1), stock)
    first = grid.join([tile[:, :1] for tile in tiles])
    np.testing.assert_array_equal(first, joined[:, :1])  # frame by frame, so any run of them
    frames = to_frames(joined, request)
    assert frames.pixels.shape == (5, size[1], size[0], 3)


def test_joining_leaves_the_tiles_as_they_were() -> None:
    grid = TileGrid(height=26, width=34, scale=8, patch=2)
    random = np.random.default_rng(0)
    tiles = [
        random.standard_normal((12, 1, box.height * 4, box.width * 4), dtype=np.float32)
        for box in grid.boxes
    ]
    before = [tile.copy() for tile in tiles]
    assert grid.join(tiles).shape == (3, 1, 208, 272)
    for tile, kept in zip(tiles, before, strict=True):
        np.testing.assert_array_equal(tile, kept)
