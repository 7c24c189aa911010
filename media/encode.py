"""Frames in, MP4 out: H.264, 4:2:0, BT.709, index before data, through ffmpeg's pipe."""

import math
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import ffmpeg
import imageio_ffmpeg

from models.tensors import Frames

# What a quota promises a job; rather too much than too little, since the real length is known only
# afterwards.
BYTES_PER_PIXEL = 0.03
# x264's macroblock tree reads memory that it has not written (its SIMD code, in the 2026 build that
# imageio-ffmpeg brings): the same frames would now and then be other bytes.
X264 = "colorprim=bt709:transfer=bt709:colormatrix=bt709:mbtree=0"


def estimate_bytes(num_frames: int, width: int, height: int) -> int:
    """About what an MP4 of this size takes, for a quota; the real length is known afterwards."""
    return math.ceil(num_frames * width * height * BYTES_PER_PIXEL)


class MediaEncodingFailed(Exception):
    """ffmpeg ended with an error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"ffmpeg failed: {self.message}"


class Mp4Encoder:
    """Encodes frames as they arrive; `finish` completes the file. Leaving early kills ffmpeg."""

    def __init__(self, path: Path, *, width: int, height: int, fps: int, threads: int) -> None:
        picture = ffmpeg.input(
            "pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=fps
        )
        video = picture.output(
            str(path),
            format="mp4",
            vcodec="libx264",
            preset="veryfast",
            crf=16,
            # Without a matrix swscale takes BT.601, and players that assume 709 show a tint.
            vf="scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd,format=yuv420p",
            colorspace="bt709",
            color_primaries="bt709",
            color_trc="bt709",
            color_range="tv",
            movflags="+faststart",
            threads=threads,
            **{"x264-params": X264},
        )
        # x264's threads are not ffmpeg's only ones: its filters would take every core.
        self.process: subprocess.Popen[bytes] = video.global_args(
            *("-loglevel", "error", "-y", "-filter_threads", str(threads))
        ).run_async(cmd=imageio_ffmpeg.get_ffmpeg_exe(), pipe_stdin=True, pipe_stderr=True)

    def __enter__(self) -> Self:
        return self

    def write(self, frames: Frames) -> None:
        """Append frames of the size given at the start; MediaEncodingFailed if ffmpeg is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(frames.pixels.tobytes())
        except BrokenPipeError as error:
            raise MediaEncodingFailed(self._last_words()) from error

    def finish(self) -> None:
        """Wait until the file is complete."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        message = self._last_words()
        if self.process.wait() != 0:
            raise MediaEncodingFailed(message)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stderr):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # what was buffered for a killed ffmpeg has no reader any more

    def _last_words(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode(errors="replace").strip()[-500:]
