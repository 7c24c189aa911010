"""MP4 files are what players expect; objects appear whole or not at all."""

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from media.encode import MediaEncodingFailed, Mp4Encoder
from media.object_store import LocalObjectStore, ObjectInfo, ObjectNotFound
from media.stills import Stills
from models.tensors import Frames


def gradient(num_frames: int, width: int, height: int) -> Frames:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.zeros((num_frames, height, width, 3), np.uint8)
    pixels[..., 0] = ramp
    pixels[..., 2] = 255 - ramp
    return Frames(pixels, fps=8)


@pytest.mark.parametrize("size", [(64, 64), (50, 34), (2, 2)])
def test_an_mp4_has_the_frames_colours_and_layout_of_the_web(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    width, height = size
    path = tmp_path / "video.mp4"
    frames = gradient(13, width, height)
    with Mp4Encoder(path, width=width, height=height, fps=8, threads=1) as encoder:
        for first in (0, 1, 5, 9):
            last = 1 if first == 0 else first + 4
            encoder.write(Frames(frames.pixels[first:last], 8))
        encoder.finish()
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(8)
        assert (codec.width, codec.height) == size
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 13
    if width > 2:
        difference = np.abs(decoded[6].astype(int) - frames.pixels[6].astype(int))
        assert np.median(difference) <= 6


def test_the_same_frames_are_the_same_file_whatever_memory_held_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MALLOC_PERTURB_ has glibc fill what it gives away, so that reading it unwritten tells."""
    chance = np.random.default_rng(0)
    blocks = np.kron(chance.integers(0, 256, (20, 20, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    moving = np.stack([blocks[n : n + 288, 2 * n : 2 * n + 288] for n in range(13)])
    written = []
    for fill in ("165", "90"):
        monkeypatch.setenv("MALLOC_PERTURB_", fill)
        path = tmp_path / f"{fill}.mp4"
        with Mp4Encoder(path, width=288, height=288, fps=8, threads=1) as encoder:
            encoder.write(Frames(moving, 8))
            encoder.finish()
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_an_encoder_that_fails_says_why(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x.mp4"
    with Mp4Encoder(path, width=64, height=64, fps=8, threads=1) as encoder:
        encoder.write(gradient(1, 64, 64))
        with pytest.raises(MediaEncodingFailed, match="No such file"):
            encoder.finish()


def test_frames_for_an_encoder_that_is_gone_are_a_failure(tmp_path: Path) -> None:
    with Mp4Encoder(tmp_path / "x.mp4", width=64, height=64, fps=8, threads=1) as encoder:
        encoder.process.kill()
        encoder.process.wait()
        with pytest.raises(MediaEncodingFailed):
            encoder.write(gradient(100, 64, 64))


def test_a_file_that_was_cut_short_is_a_failure(tmp_path: Path) -> None:
    with Mp4Encoder(tmp_path / "x.mp4", width=64, height=64, fps=8, threads=1) as encoder:
        encoder.process.kill()
        with pytest.raises(MediaEncodingFailed):
            encoder.finish()


def test_leaving_early_ends_ffmpeg(tmp_path: Path) -> None:
    with Mp4Encoder(tmp_path / "x.mp4", width=64, height=64, fps=8, threads=1) as encoder:
        encoder.write(gradient(1, 64, 64))
        assert encoder.process.poll() is None
    assert encoder.process.poll() is not None


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path / "store")


def test_what_is_put_can_be_read_whole_and_in_ranges(store: LocalObjectStore) -> None:
    assert store.put("videos/a.mp4", b"0123456789") == ObjectInfo("videos/a.mp4", 10)
    assert store.get("videos/a.mp4") == b"0123456789"
    assert store.range("videos/a.mp4", 2, 4) == b"234"
    assert store.range("videos/a.mp4", 8, 100) == b"89"
    assert store.head("videos/a.mp4").size_bytes == 10
    store.put("videos/a.mp4", b"new")
    assert store.get("videos/a.mp4") == b"new"


def test_a_file_is_moved_in(store: LocalObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"abc")
    store.put("videos/b", source)
    assert store.get("videos/b") == b"abc"
    assert not source.exists()


def test_a_list_shows_finished_objects_under_a_prefix(store: LocalObjectStore) -> None:
    for key in ("videos/b", "videos/a", "inputs/c"):
        store.put(key, b"1")
    store.incoming.mkdir(exist_ok=True)
    (store.incoming / "half").write_bytes(b"1")
    assert [info.key for info in store.list("videos/")] == ["videos/a", "videos/b"]
    assert len(list(store.list(""))) == 3


def test_a_list_goes_on_past_what_is_deleted_meanwhile(store: LocalObjectStore) -> None:
    for key in ("videos/a", "videos/b", "videos/c"):
        store.put(key, b"1")
    listed = store.list("videos/")
    assert next(listed).key == "videos/a"
    store.delete("videos/b")
    assert [info.key for info in listed] == ["videos/c"]


def test_a_list_reads_no_folder_but_the_prefix_one(
    store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("inputs/c", b"1")
    store.put("videos/a", b"1")
    opened: list[str] = []
    scandir = os.scandir

    def watch(folder: Any) -> Any:
        opened.append(str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", watch)
    assert [info.key for info in store.list("inputs/")] == ["inputs/c"]
    assert {Path(folder).name for folder in opened} == {"inputs"}


def test_what_a_put_promises_is_on_disk_with_its_name(
    store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(store.root)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    store.put("videos/new/a", b"1")
    content, *names = synced
    assert content.startswith("/.incoming/")
    # Each new folder's name, and last the object's.
    assert names[-3:] == ["", "/videos", "/videos/new"]


def test_what_a_killed_put_left_is_deleted_when_it_is_old(store: LocalObjectStore) -> None:
    store.put("a", b"1")
    half = store.incoming / "half"
    half.write_bytes(b"1")
    os.utime(half, (0, 0))  # a file that is moved in may have been written long ago
    store.delete_unfinished(60.0)
    assert half.exists()
    store.delete_unfinished(0.0)
    assert not half.exists()
    assert store.get("a") == b"1"


def test_what_is_deleted_is_gone(store: LocalObjectStore) -> None:
    store.put("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    for read in (store.get, store.head, lambda key: store.range(key, 0, 1)):
        with pytest.raises(ObjectNotFound, match="a/b"):
            read("a/b")


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a//b", ".incoming/x", "a/"])
def test_keys_cannot_leave_the_store(store: LocalObjectStore, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        store.put(key, b"1")


@pytest.mark.parametrize(
    ("num_frames", "num_tiles", "columns"), [(1, 1, 1), (13, 13, 4), (129, 25, 5)]
)
def test_stills_are_the_first_frame_and_evenly_spread_ones(
    num_frames: int, num_tiles: int, columns: int
) -> None:
    ramp = np.arange(num_frames, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[:, None, None, None], (num_frames, 300, 600, 3)) + np.uint8(50)
    stills = Stills(num_frames)
    for first in range(0, num_frames, 4):
        stills.add(pixels[first : first + 4])
    with Image.open(io.BytesIO(stills.thumbnail())) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (480, 240))
        assert abs(int(np.asarray(thumbnail)[9, 9, 0]) - 50) <= 2
    with Image.open(io.BytesIO(stills.spritesheet())) as sheet:
        assert (sheet.format, sheet.width) == ("JPEG", columns * 160)
        values = [
            int(np.asarray(sheet)[i // columns * 80 + 40, i % columns * 160 + 80, 0])
            for i in range(num_tiles)
        ]
    wanted = [50 + index * num_frames // num_tiles for index in range(num_tiles)]
    assert np.abs(np.array(values) - wanted).max() <= 3


def test_no_frame_no_picture() -> None:
    with pytest.raises(ValueError, match="no frame"):
        Stills(5).thumbnail()
    with pytest.raises(ValueError, match="no frame"):
        Stills(5).spritesheet()
