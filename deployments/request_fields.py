"""The names under which a create request's fields come: ours, the founding API's and the peers'."""

import json
import re
from typing import Any

from models.request import InvalidRequest, NotSupported

ALIASES = {
    "num_inference_steps": "num_steps",
    "steps": "num_steps",
    "start_image": "input_reference",
    "image_reference": "input_reference",
    "reference_url": "input_reference",
    "max_guidance_scale": "guidance_scale",
    "motion_bucket": "motion_bucket_id",
    "lora": "loras",
}
FIELDS = frozenset(
    {
        "prompt", "negative_prompt", "model", "seconds", "size", "width", "height", "num_frames",
        "fps", "f_patch_size", "num_steps", "guidance_scale", "flow_shift", "motion_strength",
        "min_guidance_scale", "motion_bucket_id", "noise_aug_strength", "true_cfg_scale",
        "scheduler", "loras", "seed", "input_reference", "crop", "tags", "user", "strength",
        "video", "control", "control_reference", "regions", "region_masks", "prompt_schedule",
        "seed_variance", "denoising_start", "denoising_end", "mask", "step_cache", "cfg_skip_ratio",
        "free_noise",
    }
)  # fmt: skip
# What peers take and nothing here does: refused by name, rather than dropped, as they do.
UNSUPPORTED = frozenset(
    {
        "control_type", "guidance_scale_2",
        "boundary_ratio", "frame_interpolation_exp", "quality", "task_type",
        "frame_interpolation_scale", "sound_duration", "video_reference", "audio_reference",
        "input_references", "output_quality", "output_compression", "upscaling_scale",
        "x264_preset", "video_path", "video_url",
    }
)  # fmt: skip
OFF = (False, "false", "0", 0)
# Those that may be there as long as they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, "1"),
    "num_outputs_per_prompt": (1, "1"),
    "enable_frame_interpolation": OFF,
    "enable_teacache": OFF,
    "enable_upscaling": OFF,
    "enhance_prompt": OFF,
    "generate_sound": OFF,
    "return_stage_metrics": OFF,
}
MERGED = ("extra_params", "extra_body", "extra_json")
BRACKETS = re.compile(r"(?P<name>\w+)\[(?P<key>\w*)\]")
CAMEL = re.compile(r"(?<=[a-z0-9])([A-Z])")


def nest_brackets(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A form's items: `a[b]` as {"a": {"b": ...}}, `a[]` and repeated tags as a list."""
    given: dict[str, Any] = {}
    for written, value in items:
        match = BRACKETS.fullmatch(written)
        name, key = (match["name"], match["key"]) if match else (written, None)
        if key == "" or (key is None and name == "tags"):
            found = given.setdefault(name, [])
            if not isinstance(found, list):
                raise InvalidRequest(written, f"{name} is given twice")
            found.append(value)
        elif key is None:
            if name in given:
                raise InvalidRequest(written, f"{name} is given twice")
            given[name] = value
        else:
            found = given.setdefault(name, {})
            if not isinstance(found, dict) or key in found:
                raise InvalidRequest(written, f"{written} is given twice")
            found[key] = value
    return given


def named_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields under our names; InvalidRequest for an unknown one, NotSupported for one that
    nothing here does.
    """
    fields: dict[str, Any] = {}
    for written, value in _merged(given):
        if has_surrogates(written):
            raise InvalidRequest(None, "a field's name is not valid Unicode")
        name = CAMEL.sub(lambda match: f"_{match[1].lower()}", written)
        name = ALIASES.get(name, name)
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise NotSupported(written, f"{written} is not supported here")
            continue
        if name in UNSUPPORTED:
            if value is not None:
                raise NotSupported(written, f"{written} is not supported here")
            continue
        if name not in FIELDS:
            raise InvalidRequest(written, f"unknown field {written!r}")
        if name in fields:
            raise InvalidRequest(written, f"{name} is given twice")
        if value is not None:
            fields[name] = value
    return fields


def _merged(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """The items, those of JSON objects that hold more of them among them."""
    items: list[tuple[str, Any]] = []
    for name, value in given.items():
        if name not in MERGED or value is None:
            items.append((name, value))
            continue
        content = parse_json(name, value)
        if not isinstance(content, dict):
            raise InvalidRequest(name, f"{name} must be a JSON object")
        items.extend((str(key), inner) for key, inner in content.items())
    return items


def has_surrogates(text: str) -> bool:
    """Whether the text, which came as JSON escapes, cannot be encoded."""
    return any(0xD800 <= ord(character) < 0xE000 for character in text)


def parse_json(param: str, value: Any) -> Any:
    """A value that a form holds as JSON text; what is no text is left as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(param, f"{param} is not JSON") from error
