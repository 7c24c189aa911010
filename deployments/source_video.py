"""A video that a request changes or goes on from: one that was made here, or an upload."""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.config import LimitsConfig
from media.decode import VideoShape, VideoUnreadable, read_frames, read_shape
from models.request import InvalidRequest


@dataclass(frozen=True, slots=True)
class SourceVideo:
    """The file, its shape, how many frames it has, and the first and the last one as PNG."""

    content: bytes
    shape: VideoShape
    num_frames: int
    first_frame: bytes
    last_frame: bytes

    def frames_at(self, fps: int) -> int:
        """How many frames it has at another rate."""
        return max(1, round(self.num_frames * fps / self.shape.fps))


def is_video(content: bytes) -> bool:
    """Whether it is a container of one, rather than an image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        path.write_bytes(content)
        try:
            read_shape(path)
        except VideoUnreadable:
            return False
    return True


def read_source(content: bytes, limits: LimitsConfig, param: str = "video") -> SourceVideo:
    """Decode it once, in a child process; InvalidRequest, naming param, for what can't be used."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        path.write_bytes(content)
        try:
            return _read(path, content, limits)
        except VideoUnreadable as error:
            raise InvalidRequest(param, f"{param}: {error}") from error


def every_frame(source: SourceVideo) -> Iterator[NDArray[np.uint8]]:
    """Chunks uint8 [n, H, W, 3] of its own frames, each once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        path.write_bytes(source.content)
        shape = source.shape
        yield from read_frames(
            path,
            width=shape.width,
            height=shape.height,
            fps=shape.fps,
            max_frames=source.num_frames,
        )


def _read(path: Path, content: bytes, limits: LimitsConfig) -> SourceVideo:
    """VideoUnreadable."""
    shape = read_shape(path)
    if shape.width * shape.height > limits.image.max_pixels:
        raise VideoUnreadable(f"more than {limits.image.max_pixels} pixels")
    even = VideoShape(shape.width - shape.width % 2, shape.height - shape.height % 2, shape.fps)
    if not even.width or not even.height:
        raise VideoUnreadable("its picture is too small")
    first: NDArray[np.uint8] | None = None
    last: NDArray[np.uint8] | None = None
    num_frames = 0
    for chunk in read_frames(
        path,
        width=even.width,
        height=even.height,
        fps=even.fps,
        max_frames=limits.max_source_frames + 1,
    ):
        first = chunk[0].copy() if first is None else first
        last = chunk[-1].copy()
        num_frames += len(chunk)
    if first is None or last is None:
        raise VideoUnreadable("it has no frames")
    if num_frames > limits.max_source_frames:
        raise VideoUnreadable(f"more than {limits.max_source_frames} frames")
    return SourceVideo(content, even, num_frames, _png(first), _png(last))


def _png(frame: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "PNG", compress_level=1)
    return content.getvalue()
