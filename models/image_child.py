"""Reads one image in a process of its own, which may be killed for what it takes.

Run by path, with nothing of ours to import: the image on stdin, settings as JSON in the only
argument; on stdout a line of JSON {width, height} and then a PNG of the size that was asked for.
Status 2 means that the image, or its crop box, is at fault; stderr says how.
"""

import json
import resource
import struct
import sys

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def main() -> None:
    """Set the limits first, then import what decodes."""
    settings = json.loads(sys.argv[1])
    memory, seconds = settings["max_memory_bytes"], settings["max_cpu_s"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # the bound is ours
    content = sys.stdin.buffer.read()
    # What Pillow raises for damaged files of these formats.
    unreadable = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (*unreadable, struct.error):
        _refuse("is not an image that can be read")
    width, height = image.size
    if width * height > settings["max_pixels"]:
        _refuse(f"of {width}x{height} has more than {settings['max_pixels']} pixels")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGB")
    except (*unreadable, struct.error):
        _refuse("is not an image that can be read")
    box = settings["crop"] or [0, 0, upright.width, upright.height]
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if right > upright.width or bottom > upright.height:
        _refuse(f"is {upright.width}x{upright.height}: the crop box lies outside", crop=True)
    wanted_width, wanted_height = settings["size"]
    # The box covers the frame; of what hangs over, the middle is kept.
    scale = max(wanted_width / box[2], wanted_height / box[3])
    # Rounding may leave a little less than nothing.
    spare_x = max(0.0, box[2] - wanted_width / scale)
    spare_y = max(0.0, box[3] - wanted_height / scale)
    fitted = upright.resize(
        (wanted_width, wanted_height),
        Image.Resampling.LANCZOS,
        box=(left + spare_x / 2, top + spare_y / 2, right - spare_x / 2, bottom - spare_y / 2),
    )
    out = io.BytesIO()
    fitted.save(out, "PNG", compress_level=1)
    said = json.dumps({"width": box[2], "height": box[3]})
    sys.stdout.buffer.write(said.encode() + b"\n" + out.getvalue())


def _refuse(message: str, *, crop: bool = False) -> None:
    sys.stderr.write(json.dumps({"message": message, "crop": crop}))
    raise SystemExit(2)


if __name__ == "__main__":
    main()
