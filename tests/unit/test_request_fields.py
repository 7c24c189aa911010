"""The names that a create request's fields come under."""

from typing import Any

import pytest

from deployments.request_fields import named_fields, nest_brackets
from models.request import InvalidRequest, NotSupported


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"numFrames": 9, "guidanceScale": 2}, {"num_frames": 9, "guidance_scale": 2}),
        ({"num_inference_steps": 4}, {"num_steps": 4}),
        ({"fPatchSize": 2, "motionStrength": 0.7}, {"f_patch_size": 2, "motion_strength": 0.7}),
        ({"extra_params": '{"seed": 4}', "fps": 8}, {"seed": 4, "fps": 8}),
        ({"extra_body": {"negativePrompt": "a"}}, {"negative_prompt": "a"}),
        ({"n": 1, "enable_upscaling": "false", "seed": None}, {}),
        ({"reference_url": "https://x/y"}, {"input_reference": "https://x/y"}),
    ],
)
def test_known_names(given: dict[str, Any], fields: dict[str, Any]) -> None:
    assert named_fields(given) == fields


@pytest.mark.parametrize(
    ("given", "error", "param"),
    [
        ({"colour": 1}, InvalidRequest, "colour"),
        ({"steps": 1, "num_steps": 1}, InvalidRequest, "num_steps"),
        ({"seed": 1, "extra_params": '{"seed": 1}'}, InvalidRequest, "seed"),
        ({"extra_params": "[]"}, InvalidRequest, "extra_params"),
        ({"control_type": "canny"}, NotSupported, "control_type"),
        ({"n": 2}, NotSupported, "n"),
        ({"generate_sound": True}, NotSupported, "generate_sound"),
    ],
)
def test_refused_names(given: dict[str, Any], error: type[Exception], param: str) -> None:
    with pytest.raises(error) as refused:
        named_fields(given)
    assert getattr(refused.value, "param", None) == param


def test_a_forms_brackets_nest() -> None:
    items = [("tags[]", "a"), ("tags[]", "b"), ("crop[x]", "1"), ("crop[y]", "2"), ("fps", "8")]
    assert nest_brackets(items) == {"tags": ["a", "b"], "crop": {"x": "1", "y": "2"}, "fps": "8"}
    assert nest_brackets([("tags", "a")]) == {"tags": ["a"]}


@pytest.mark.parametrize(
    "names", [("fps", "fps"), ("crop[x]", "crop[x]"), ("crop", "crop[x]"), ("crop[x]", "crop[]")]
)
def test_a_field_that_comes_twice_is_refused(names: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        nest_brackets([(name, "1") for name in names])
