"""Edges are where a picture changes, and nowhere else."""

import numpy as np
from numpy.typing import NDArray

from media.edges import find_edges

SIDE = 48


def disc(x: int, radius: int = 10) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    inside = (rows - SIDE // 2) ** 2 + (columns - x) ** 2 < radius**2
    picture = np.full((SIDE, SIDE, 3), 40, np.uint8)
    picture[inside] = (220, 60, 200)
    return picture


def test_each_picture_has_its_own_outline_white_on_black() -> None:
    pictures = np.stack([disc(16), disc(32), np.full((SIDE, SIDE, 3), 90, np.uint8)])
    edges = find_edges(pictures)
    assert edges.shape == pictures.shape
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[2].any()
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for picture, x in zip(edges, (16, 32), strict=False):
        found = picture[..., 0] > 0
        distance = np.hypot(rows - SIDE // 2, columns - x)
        assert np.abs(distance[found] - 10).max() <= 2
        angles = np.arctan2(rows - SIDE // 2, columns - x)[found]
        covered = np.histogram(angles, bins=12, range=(-np.pi, np.pi))[0]
        assert covered.all()
        assert found.sum() < 2 * np.pi * 10 * 2  # thinned to a line


def test_what_hardly_changes_has_no_edge() -> None:
    slope = np.linspace(0, 255, SIDE).astype(np.uint8)
    picture = np.broadcast_to(slope[None, :, None], (SIDE, SIDE, 3))
    assert not find_edges(picture[None].copy()).any()


def test_a_change_of_colour_alone_is_an_edge() -> None:
    picture = np.full((1, SIDE, SIDE, 3), 26, np.uint8)
    picture[:, 12:36, 12:36] = (240, 20, 20)  # as bright as 90, which is no edge before 26
    grey = np.full((1, SIDE, SIDE, 3), 26, np.uint8)
    grey[:, 12:36, 12:36] = 70
    assert find_edges(picture).any()
    assert not find_edges(grey).any()
