"""One prompt to one file, with a live progress bar and the bill."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from client.client import Client

PHASES = {
    "queued": "queued",
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "media": "encoding",
    "done": "done",
}


class GenerationFailed(Exception):
    """The job ended without a video."""

    def __init__(self, video_id: str, message: str) -> None:
        super().__init__(video_id, message)
        self.video_id, self.message = video_id, message

    def __str__(self) -> str:
        return f"{self.video_id}: {self.message}"


def generate(
    client: Client,
    fields: dict[str, Any],
    *,
    image: Path | None = None,
    control_file: Path | None = None,
    out: Path | None = None,
) -> Path:
    """Make a video and save it, by default as out/<video-id>.mp4; prints progress and cost."""
    started_s = time.monotonic()
    video = client.create(fields, image, control_file)
    print(f"{video['id']}: {video['size']}, {video['num_frames']} frames, seed {video['seed']}")
    video = _show_progress(client, video["id"])
    if video["status"] != "completed":
        error = video["error"] or {"message": "no reason given"}
        print(_bill(video, client.credits()))
        raise GenerationFailed(video["id"], error["message"])
    path = out or Path("out") / f"{video['id']}.mp4"
    size_bytes = client.download(video["id"], path)
    print(f"saved {path} ({size_bytes:,} bytes) in {time.monotonic() - started_s:.1f} s")
    for warning in video["warnings"]:
        print(f"note: {warning}")
    print(_bill(video, client.credits()))
    stages = ", ".join(f"{name} {s:.2f} s" for name, s in video["stage_seconds"].items())
    print(f"stages: {stages}")
    return path


def _show_progress(client: Client, video_id: str) -> dict[str, Any]:
    with tqdm(
        total=100, bar_format="{desc:<28} {bar:30} {percentage:3.0f}% [{elapsed}]", leave=True
    ) as bar:
        for event in client.follow(video_id):
            data = event.data
            bar.set_description_str(_describe(data), refresh=False)
            bar.update(data["percentage"] - bar.n)
            bar.refresh()
            if "video" in data:
                video: dict[str, Any] = data["video"]
                return video
    raise GenerationFailed(video_id, "its events ended early")


def _describe(data: dict[str, Any]) -> str:
    text = PHASES[data["phase"]]
    if data["num_steps"]:
        return f"{text} {data['step']}/{data['num_steps']}"
    if data["num_frames"]:
        return f"{text} {data['frame']}/{data['num_frames']}"
    return text


def _bill(video: dict[str, Any], credits: dict[str, Any]) -> str:
    return (
        f"credits: quoted {video['quoted']}, charged {video['charged']}, "
        f"refunded {video['refunded']}, balance {credits['available']:,}"
    )
