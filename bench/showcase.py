"""Makes docs/showcase.webp: clips that a running server makes from prompts, side by side."""

import tempfile
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.client import Client, find_server

PROMPTS = (
    "a red circle moving right",
    "a yellow square sliding to the left on a dark background",
    "a blue triangle drifting upwards on a light background",
    "a green ball going down",
    "on a black background, a cyan box moving diagonally",
    "a purple triangle standing still",
)
COLUMNS, SCALE, GAP_PX = 3, 3, 4


def make_clip(client: Client, prompt: str, folder: Path) -> NDArray[np.uint8]:
    """uint8 [F, H, W, 3] of a finished video."""
    video = client.create({"prompt": prompt, "seed": 3})
    for event in client.follow(video["id"]):
        if event.kind == "failed":
            raise RuntimeError(event.data["video"]["error"])
    path = folder / f"{video['id']}.mp4"
    client.download(video["id"], path)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Client(find_server()) as client:
        clips = [make_clip(client, prompt, Path(folder)) for prompt in PROMPTS]
    enlarged = [clip.repeat(SCALE, axis=1).repeat(SCALE, axis=2) for clip in clips]
    framed = [
        np.pad(clip, ((0, 0), (GAP_PX, GAP_PX), (GAP_PX, GAP_PX), (0, 0)), constant_values=120)
        for clip in enlarged
    ]
    rows = [
        np.concatenate(framed[first : first + COLUMNS], axis=2)
        for first in range(0, len(framed), COLUMNS)
    ]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    target = Path("docs/showcase.webp")
    frames[0].save(
        target, save_all=True, append_images=frames[1:], duration=125, loop=0, quality=80
    )
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
