"""Canny's edges of pictures, by ffmpeg: what leads a video that is asked for by its outlines."""

import subprocess

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

# Of 255, as ControlNet's authors have them of OpenCV's `Canny`: 100 and 200.
LOW, HIGH = 100 / 255, 200 / 255
MAX_S = 120.0


def find_edges(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [F, H, W, 3] -> the same, white on black.

    Canny's detector (IEEE TPAMI 8(6), 1986): blurred, Sobel's gradients thinned to their ridges,
    and kept from the high threshold on, or from the low one where they touch those. Each of red,
    green and blue by itself: a red ball before black is hardly brighter, and has an edge.
    """
    frames, height, width, _ = pictures.shape
    form = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}")
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin"),
        *("-threads", "1", "-filter_threads", "1", *form, "-i", "pipe:"),
        *(
            "-vf",
            f"format=gbrp,edgedetect=mode=canny:low={LOW}:high={HIGH}",
            "-fps_mode",
            "passthrough",
        ),
        *("-f", "rawvideo", "-pix_fmt", "gbrp", "pipe:"),
    ]
    made = subprocess.run(
        command, input=pictures.tobytes(), capture_output=True, check=True, timeout=MAX_S
    )
    edges = np.frombuffer(made.stdout, np.uint8).reshape(frames, 3, height, width)
    white = np.where(edges.any(axis=1), 255, 0).astype(np.uint8)
    return np.repeat(white[..., None], 3, axis=3)
