"""Masks of pixels, as they are kept for a job: a numpy file of packed bits."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def as_mask(pictures: NDArray[np.uint8]) -> Mask:
    """uint8 [F, H, W, 3] -> bool [F, H, W]: what is nearer to white than to black."""
    light: Mask = pictures.mean(axis=3) >= 128
    return light


def write_masks(masks: Sequence[Mask]) -> bytes:
    """Of bool [F or 1, H, W] each, of one size; those of one frame are for all."""
    frames = max(len(mask) for mask in masks)
    same = np.stack([np.broadcast_to(mask, (frames, *mask.shape[1:])) for mask in masks])
    content = io.BytesIO()
    np.savez_compressed(content, bits=np.packbits(same), shape=np.array(same.shape))
    return content.getvalue()


def read_masks(content: bytes) -> Mask:
    """bool [M, F or 1, H, W]."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        shape = tuple(file["shape"])
        bits = np.unpackbits(file["bits"], count=int(np.prod(shape)))
    read: Mask = bits.reshape(shape).astype(bool)
    return read
