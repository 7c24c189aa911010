"""Start images: fitted as they are shown, and decoded where nothing else can be hurt."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.request import InvalidRequest
from models.start_image import CropBox, ImageLimits, StartImage, prepare_start_image

LIMITS = ImageLimits(max_pixels=100_000)


def halves(width: int, height: int, kind: str = "PNG", **save: Any) -> bytes:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **save)
    return content.getvalue()


def prepare(content: bytes, **arguments: Any) -> StartImage:
    given: dict[str, Any] = {"size": (8, 8), "crop": None, "limits": LIMITS, "param": "p"}
    return prepare_start_image(content, **{**given, **arguments})


def pixels(image: StartImage) -> Any:
    with Image.open(io.BytesIO(image.png)) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_image_covers_the_frame_and_keeps_its_middle(kind: str) -> None:
    image = prepare(halves(60, 20, kind))
    assert image.aspect == 3.0
    found = pixels(image)
    assert found.shape == (8, 8, 3)
    assert found[4, 1, 0] > 180 > 60 > found[4, 1, 2]
    assert found[4, 6, 2] > 180 > 60 > found[4, 6, 0]


@pytest.mark.parametrize("side", [98, 49, 103])
def test_sizes_whose_ratio_is_not_exact_are_no_fault(side: int) -> None:
    assert prepare(halves(side, side), size=(64, 64)).aspect == 1.0


def test_the_crop_box_comes_before_the_resize() -> None:
    image = prepare(halves(60, 20), crop=CropBox(35, 5, 20, 10))
    assert image.aspect == 2.0
    assert (pixels(image) == [0, 0, 255]).all()


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    found = pixels(prepare(halves(40, 40, "JPEG", exif=exif.tobytes(), quality=95)))
    assert found[1, 4, 0] > 200 > found[6, 4, 0]


@pytest.mark.parametrize(
    ("content", "arguments", "param"),
    [
        (b"", {}, "p"),
        (b"no image", {}, "p"),
        (halves(60, 20)[:60], {}, "p"),
        (halves(400, 300), {}, "p"),
        (halves(60, 20), {"crop": CropBox(50, 0, 20, 10)}, "crop"),
        (halves(60, 20), {"crop": CropBox(0, 11, 20, 10)}, "crop"),
    ],
)
def test_what_cannot_be_used_names_its_field(
    content: bytes, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        prepare(content, **arguments)
    assert refused.value.param == param


def test_an_image_that_takes_too_much_ends_its_child_alone() -> None:
    content = halves(9000, 9000)
    limits = ImageLimits(max_pixels=10**9, max_memory_bytes=1 << 28)
    with pytest.raises(InvalidRequest, match="more memory or time"):
        prepare(content, limits=limits)
    assert prepare(content, limits=ImageLimits(max_pixels=10**9)).aspect == 1.0


def test_an_image_that_takes_too_long_is_ended() -> None:
    content = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(content, "PNG", compress_level=1)  # 2 s for 79 kB
    roomy = {"max_pixels": 10**9, "max_memory_bytes": 4 << 30}
    with pytest.raises(InvalidRequest, match="more memory or time"):
        prepare(content.getvalue(), limits=ImageLimits(**roomy, max_cpu_s=1))
    assert prepare(content.getvalue(), limits=ImageLimits(**roomy, max_cpu_s=60)).aspect == 1.0
