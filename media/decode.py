"""Reads videos back: what users upload, and what was made here before."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

LIMITED = Path(__file__).with_name("limited.py")
MAX_MEMORY_BYTES, MAX_CPU_S, MAX_HEAD_S = 2 << 30, 60, 20.0
FORMATS = "mov,mp4,matroska,webm,avi,gif"
CHUNK_BYTES, MAX_LINE_CHARS = 16 << 20, 1000
# Only of ffmpeg's own lines: what else it prints, users may have written into the file.
STREAM = re.compile(r"^ {2,4}Stream #\d+:\d+[^\n]{0,40}: Video: [^\n]{1,800}$", re.MULTILINE)
SIZE = re.compile(r", (?P<width>[1-9]\d{0,4})x(?P<height>[1-9]\d{0,4})[ ,]")
RATE = re.compile(r", (?P<fps>\d{1,4}(\.\d{1,6})?) fps")
ROTATED = re.compile(r"rotation of -?(90|270)")


class VideoUnreadable(Exception):
    """The file is no video that can be read within the limits."""


@dataclass(frozen=True, slots=True)
class VideoShape:
    """Size in pixels as it is shown, and whole frames a second."""

    width: int
    height: int
    fps: int


def read_shape(path: Path) -> VideoShape:
    """What the file's head says; decodes nothing. VideoUnreadable."""
    try:
        asked = subprocess.run(_ffmpeg(path), capture_output=True, timeout=MAX_HEAD_S)
        said = asked.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        raise VideoUnreadable("the video takes too long to read") from error
    said = "\n".join(line for line in said.split("\n") if len(line) < MAX_LINE_CHARS)
    line = STREAM.search(said)
    found = None if line is None else SIZE.search(line[0])
    rate = None if line is None else RATE.search(line[0])
    if found is None or rate is None:
        raise VideoUnreadable("the file is not a video that can be read")
    size = int(found["width"]), int(found["height"])
    width, height = size[::-1] if ROTATED.search(said) else size
    return VideoShape(width, height, min(max(round(float(rate["fps"])), 1), 60))


def read_frames(
    path: Path, *, width: int, height: int, fps: int, max_frames: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield chunks uint8 [n, height, width, 3] in RGB at that rate, max_frames of them at most.

    The picture covers the size and its middle is kept. VideoUnreadable.
    """
    picture = (
        f"fps={fps},scale={width}:{height}:force_original_aspect_ratio=increase:"
        f"flags=lanczos+accurate_rnd,crop={width}:{height}"
    )
    output = ("-an", "-vf", picture, "-frames:v", str(max_frames), "-f", "rawvideo")
    command = [*_ffmpeg(path), *output, "-pix_fmt", "rgb24", "pipe:"]
    frame_bytes = width * height * 3
    chunk_bytes = max(1, CHUNK_BYTES // frame_bytes) * frame_bytes
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            while content := process.stdout.read(chunk_bytes):
                whole = len(content) // frame_bytes
                if whole:
                    flat = np.frombuffer(content[: whole * frame_bytes], np.uint8)
                    yield flat.reshape(whole, height, width, 3)
            if process.wait() != 0:
                raise VideoUnreadable("the video ends in what cannot be read")
        finally:
            process.kill()


def read_all_frames(
    path: Path, *, width: int, height: int, fps: int, max_frames: int
) -> NDArray[np.uint8]:
    """All frames as one array uint8 [F, height, width, 3]; VideoUnreadable if there is none."""
    chunks = list(read_frames(path, width=width, height=height, fps=fps, max_frames=max_frames))
    if not chunks:
        raise VideoUnreadable("the video has no frames")
    return np.concatenate(chunks)


def _ffmpeg(path: Path) -> list[str]:
    """No network and no other files: a playlist in disguise leads nowhere."""
    return [
        *(sys.executable, "-I", str(LIMITED), str(MAX_MEMORY_BYTES), str(MAX_CPU_S)),
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin"),
        *("-threads", "1", "-filter_threads", "1"),
        *("-protocol_whitelist", "file", "-format_whitelist", FORMATS),
        *("-i", str(path.absolute())),
    ]
