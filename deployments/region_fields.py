"""Words for parts of a video, as requests have them: by place, by frames, one after another."""

from itertools import pairwise
from typing import Any

from deployments.picture_fields import read_picture
from models.request import InvalidRequest, VideoRequest

BOX = ("x", "y", "width", "height")
KNOWN = {"prompt", "box", "frames", "mask"}


def read_regions(fields: dict[str, Any]) -> tuple[bytes | str, ...]:
    """Make `regions` what VideoRequest has, and take out the masks, in their order.

    Each is {"prompt"} with "box" ({x, y, width, height} or a list of them), "frames" (first and
    last) and "mask": an image or a video, or the number of a file of region_masks.
    """
    files = fields.pop("region_masks", [])
    regions = fields.get("regions")
    if regions is None:
        if files:
            raise InvalidRequest("regions", "regions is required: what region_masks are of")
        return ()
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise InvalidRequest("regions", "regions must be a list of objects")
    files = files if isinstance(files, list) else [files]
    masks = []
    read = []
    for region in regions:
        if unknown := set(region) - KNOWN:
            message = f"regions take no {min(unknown)}; they take {', '.join(sorted(KNOWN))}"
            raise InvalidRequest("regions", message)
        if not isinstance(region.get("prompt"), str) or not region["prompt"].strip():
            raise InvalidRequest("regions", "regions: each needs a prompt")
        mask = _mask_of(region.get("mask"), files)
        if mask is not None:
            masks.append(mask)
        box = region.get("box")
        if isinstance(box, dict):
            if set(box) != set(BOX):
                raise InvalidRequest("regions", "regions: a box has x, y, width and height")
            box = [box[name] for name in BOX]
        given = {"prompt": region["prompt"], "box": box, "frames": region.get("frames")}
        read.append({**given, "has_mask": mask is not None})
    fields["regions"] = read
    return tuple(masks)


def _mask_of(mask: Any, files: list[Any]) -> bytes | str | None:
    if mask is None:
        return None
    if isinstance(mask, int) and not isinstance(mask, bool):
        if not 0 <= mask < len(files):
            message = f"regions: mask {mask} is none of the {len(files)} region_masks"
            raise InvalidRequest("regions", message)
        mask = files[mask]
    return read_picture("regions", mask)


def read_schedule(fields: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """[{"frame", "prompt"}], by frame; until the first of them, the prompt has its say."""
    param = "prompt_schedule"
    schedule = fields.pop(param, None)
    if schedule is None:
        return ()
    if fields.get("regions") is not None:
        raise InvalidRequest(param, f"{param} and regions exclude each other")
    if not isinstance(schedule, list) or not schedule:
        raise InvalidRequest(param, f"{param} must be a list of frame and prompt")
    turns = []
    for turn in schedule:
        if not isinstance(turn, dict) or set(turn) != {"frame", "prompt"}:
            raise InvalidRequest(param, f"{param}: each has a frame and a prompt")
        frame, prompt = turn["frame"], turn["prompt"]
        if not isinstance(frame, int) or isinstance(frame, bool) or frame < 0:
            raise InvalidRequest(param, f"{param}: frame must be a whole number from 0")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidRequest(param, f"{param}: each needs a prompt")
        turns.append((frame, prompt))
    frames = [frame for frame, _ in turns]
    if frames != sorted(set(frames)):
        raise InvalidRequest(param, f"{param}: frames must be in order, each once")
    return tuple(turns)


def in_turn(schedule: tuple[tuple[int, str], ...], request: VideoRequest) -> list[dict[str, Any]]:
    """The schedule as regions: each text from its frame to that before the next one's."""
    if schedule[-1][0] >= request.num_frames:
        message = f"prompt_schedule: frames must be of 0 to {request.num_frames - 1}"
        raise InvalidRequest("prompt_schedule", message)
    starts = [*(frame for frame, _ in schedule), request.num_frames]
    return [
        {"prompt": prompt, "frames": [first, following - 1]}
        for (_, prompt), (first, following) in zip(schedule, pairwise(starts), strict=True)
    ]
