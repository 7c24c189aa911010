"""The published families' checkpoints: what their own files say, and what is refused by field."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.catalog import load_model
from models.request import InvalidRequest, NotSupported
from models.spec import Use, WeightsDamaged, WeightsMissing
from models.stages import load_denoiser
from training.random_families import RANDOM_FAMILIES

RandomFamily = Callable[[str], Path]
FAMILIES = list(RANDOM_FAMILIES)


@pytest.fixture
def copied(random_family: RandomFamily, tmp_path: Path) -> RandomFamily:
    """The folder of a family's checkpoint, to be changed."""

    def copy(name: str) -> Path:
        return shutil.copytree(random_family(name), tmp_path / name)

    return copy


def name_scheduler(folder: Path, class_name: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": class_name}))


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("animatediff", {"frame_stride": 1, "size_multiple": 8, "max_positions": 32}),
        ("svd", {"frame_stride": 1, "size_multiple": 16, "start_image": Use.REQUIRED}),
        ("hunyuan-video", {"frame_stride": 4, "size_multiple": 16, "start_image": Use.REFUSED}),
        ("hunyuan-video-concat", {"dropped_frames": 4, "start_image": Use.REQUIRED}),
        ("hunyuan-video-replace", {"dropped_frames": 0, "start_image": Use.REQUIRED}),
    ],
)
def test_what_a_checkpoint_makes_is_in_its_own_files(
    random_family: RandomFamily, family: str, spec: dict[str, Any]
) -> None:
    found = dataclasses.asdict(load_model(random_family(family)).spec)
    assert {name: found[name] for name in spec} == spec
    assert found["f_patch_sizes"] == (1,)
    assert found["latent_scale"] == 8


def test_frames_that_will_be_dropped_are_generated_too(random_family: RandomFamily) -> None:
    spec = load_model(random_family("hunyuan-video-concat")).spec
    assert [spec.generated_frames(count, 1) for count in (1, 2, 9, 129)] == [5, 9, 13, 133]


@pytest.mark.parametrize(
    ("family", "fields", "param"),
    [
        ("animatediff", {"num_frames": 33}, "num_frames"),
        ("animatediff", {"f_patch_size": 2}, "f_patch_size"),
        ("animatediff", {"motion_bucket_id": 5}, "motion_bucket_id"),
        ("animatediff", {"true_cfg_scale": 2}, "true_cfg_scale"),
        ("animatediff", {"flow_shift": 2}, "flow_shift"),
        ("animatediff", {"scheduler": "unipc"}, "scheduler"),
        ("animatediff", {"scheduler": "lcm", "num_steps": 51}, "num_steps"),
        ("svd", {"num_frames": 15}, "num_frames"),
        ("svd", {"motion_bucket_id": 256}, "motion_bucket_id"),
        ("svd", {"noise_aug_strength": -0.1}, "noise_aug_strength"),
        ("svd", {"negative_prompt": "blurred"}, "negative_prompt"),
        ("svd", {"width": 8}, "size"),
        ("svd", {"scheduler": "lcm"}, "scheduler"),
        ("svd-xt", {"num_frames": 26}, "num_frames"),
        ("svd", {"motion_bucket_id": 5, "motion_strength": 0.5}, "motion_strength"),
        ("hunyuan-video", {"prompt": "an <image> cat"}, "prompt"),
        ("hunyuan-video", {"negative_prompt": "<image>"}, "negative_prompt"),
        ("hunyuan-video-concat", {"guidance_scale": 3}, "guidance_scale"),
        ("hunyuan-video", {"num_frames": 130}, "num_frames"),
        ("hunyuan-video", {"min_guidance_scale": 1}, "min_guidance_scale"),
        ("hunyuan-video", {"true_cfg_scale": 0.5}, "true_cfg_scale"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_field(
    random_family: RandomFamily, family: str, fields: dict[str, Any], param: str
) -> None:
    model = load_model(random_family(family))
    with pytest.raises(InvalidRequest) as refused:
        model.resolve({"prompt": "x", **fields})
    assert refused.value.param == param


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_inputs_that_a_model_takes_are_admitted(
    random_family: RandomFamily, family: str
) -> None:
    model = load_model(random_family(family))
    from_image = model.spec.start_image is Use.REQUIRED
    model.check_inputs(start_image=from_image)
    with pytest.raises(InvalidRequest) as refused:
        model.check_inputs(start_image=not from_image)
    assert refused.value.param == "input_reference"
    if family == "animatediff":
        model.check_inputs(start_image=False, source_video=True)
    else:
        with pytest.raises(NotSupported) as refused:
            model.check_inputs(start_image=from_image, source_video=True)
        assert refused.value.param == "video"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(
    copied: RandomFamily, family: str
) -> None:
    folder = copied(family)
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match=part):
        load_model(folder)


def test_every_shard_that_an_index_names_has_to_be_there(copied: RandomFamily) -> None:
    folder = copied("hunyuan-video")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-2.safetensors"]
    index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    with pytest.raises(WeightsMissing, match="model-2"):
        load_model(folder)


def test_an_adapter_is_part_of_a_checkpoint_without_motion_in_its_unet(
    copied: RandomFamily,
) -> None:
    folder = copied("animatediff")
    (folder / "motion_adapter" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match="motion_adapter"):
        load_model(folder)


def test_the_checkpoints_own_scheduler_bounds_the_steps(copied: RandomFamily) -> None:
    folder = copied("animatediff")
    name_scheduler(folder, "LCMScheduler")
    model = load_model(folder)
    with pytest.raises(InvalidRequest, match="at most 50"):
        model.resolve({"prompt": "x", "num_steps": 51})
    assert model.resolve({"prompt": "x", "num_steps": 51, "scheduler": "ddim"}).num_steps == 51


def test_a_scheduler_that_nothing_here_knows_is_refused(copied: RandomFamily) -> None:
    folder = copied("animatediff")
    name_scheduler(folder, "PNDMScheduler")
    with pytest.raises(WeightsDamaged, match="PNDMScheduler"):
        load_denoiser(load_model(folder))
