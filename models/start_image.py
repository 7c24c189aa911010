"""Start images: checked at the door without trust, fitted to the frame before encoding."""

import io
import struct
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.request import InvalidRequest

UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def check_start_image(content: bytes, *, max_pixels: int, param: str) -> tuple[int, int]:
    """Width and height of a readable image; InvalidRequest naming param for anything else."""
    try:
        with warnings.catch_warnings():  # above 89 megapixels; the bound below is ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        with opened as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidRequest(
                    param, f"{param}: {width}x{height} is more than {max_pixels} pixels"
                )
            image.load()
    except UNREADABLE as error:
        raise InvalidRequest(param, f"{param} is not an image that can be read") from error
    return width, height


def fit_start_image(
    content: bytes, *, size: tuple[int, int], generated_size: tuple[int, int]
) -> NDArray[np.float32]:
    """float32 [3, H, W] in -1..1 at generated_size, both sizes as (width, height).

    The image covers the asked size (its middle is kept) and its edge repeats outwards up to the
    generated size, so that the trim after decoding gives the image back.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        pixels = image.convert("RGB")
    scale = max(size[0] / pixels.width, size[1] / pixels.height)
    covered = (size[0] / scale, size[1] / scale)
    left, top = (pixels.width - covered[0]) / 2, (pixels.height - covered[1]) / 2
    fitted = pixels.resize(
        size, Image.Resampling.LANCZOS, box=(left, top, left + covered[0], top + covered[1])
    )
    extra_x, extra_y = generated_size[0] - size[0], generated_size[1] - size[1]
    around = (
        (extra_y // 2, extra_y - extra_y // 2),
        (extra_x // 2, extra_x - extra_x // 2),
        (0, 0),
    )
    padded = np.pad(np.asarray(fitted), around, mode="edge")
    return np.ascontiguousarray(padded.transpose(2, 0, 1), np.float32) / 127.5 - 1.0
