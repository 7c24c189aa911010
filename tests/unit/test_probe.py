"""What weights are is told by their names and shapes; what is no model is refused with a reason."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_motion_model import MotionAdapter
from safetensors.torch import save_file

from models.probe import Base, Found, ModelType, NotRecognised, find_all, probe
from models.spec import WeightsDamaged

ROOT = Path(__file__).resolve().parents[2]
MUTOSCOPE = Path(sys.executable).with_name("mutoscope")
NARROW: dict[str, Any] = {"block_out_channels": (8, 8), "motion_norm_num_groups": 2}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def named(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


def adapter(mid_block: bool, max_frames: int) -> dict[str, torch.Tensor]:
    return weights_of(
        MotionAdapter(
            use_motion_mid_block=mid_block,
            motion_max_seq_length=max_frames,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            **NARROW,
        )
    )


def wan_vae() -> dict[str, torch.Tensor]:
    return weights_of(
        AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    )


def hunyuan_vae() -> dict[str, torch.Tensor]:
    kinds = {"down": "HunyuanVideoDownBlock3D", "up": "HunyuanVideoUpBlock3D"}
    return weights_of(
        AutoencoderKLHunyuanVideo(
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=(kinds["down"],) * 4,
            up_block_types=(kinds["up"],) * 4,
        )
    )


def controlnet() -> dict[str, torch.Tensor]:
    return weights_of(
        ControlNetModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            norm_num_groups=2,
            cross_attention_dim=8,
        )
    )


FILES: list[tuple[Callable[[], dict[str, torch.Tensor]], ModelType, Base, dict[str, Any]]] = [
    (lambda: adapter(False, 24), ModelType.MOTION_MODULE, Base.SD_1, {"version": "v1"}),
    (lambda: adapter(True, 32), ModelType.MOTION_MODULE, Base.SD_1, {"version": "v2"}),
    (lambda: adapter(False, 32), ModelType.MOTION_MODULE, Base.SD_1, {"max_frames": 32}),
    (wan_vae, ModelType.VIDEO_VAE, Base.WAN, {}),
    (hunyuan_vae, ModelType.VIDEO_VAE, Base.HUNYUAN_VIDEO, {}),
    (controlnet, ModelType.CONTROLNET, Base.SD_1, {}),
    (
        lambda: named("control_layers.0.attention.to_q.weight"),
        ModelType.CONTROLNET, Base.Z_IMAGE, {},
    ),
    (
        lambda: named("double_blocks.0.img_mod.linear.weight", "single_blocks.0.linear1.weight",
                      "txt_in.t_embedder.mlp.0.weight"),
        ModelType.MAIN, Base.HUNYUAN_VIDEO, {},
    ),
    (
        lambda: named("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.2.weight"),
        ModelType.MAIN, Base.SVD, {},
    ),
    (
        lambda: named("all_x_embedder.2-1.weight", "cap_embedder.0.weight"),
        ModelType.MAIN, Base.Z_IMAGE, {"f_patch_sizes": [1]},
    ),
    (
        lambda: named("diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"),
        ModelType.LORA, Base.HUNYUAN_VIDEO, {},
    ),
    (
        lambda: named("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        ModelType.LORA, Base.HUNYUAN_VIDEO, {},
    ),
    (
        lambda: named("transformer.layers.0.attention.to_q.lora_A.weight"),
        ModelType.LORA, Base.Z_IMAGE, {},
    ),
    (
        lambda: named("lora_unet__layers_0_attention_to_q.lora_down.weight"),
        ModelType.LORA, Base.Z_IMAGE, {},
    ),
    (
        lambda: named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        ModelType.LORA, Base.SD_1, {},
    ),
    (
        lambda: named("unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
                      ".lora_A.weight"),
        ModelType.LORA, Base.SVD, {},
    ),
    (
        lambda: named("base_model.model.layers.0.attention.to_q.lora_A.weight"),
        ModelType.LORA, Base.Z_IMAGE, {},
    ),
    (
        lambda: named("down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.processor"
                      ".to_q_lora.down.weight"),
        ModelType.LORA, Base.SD_1, {"motion": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "kind", "base", "details"), FILES)
def test_a_file_is_told_by_its_keys(
    tmp_path: Path,
    tensors: Callable[[], dict[str, torch.Tensor]],
    kind: ModelType,
    base: Base,
    details: dict[str, Any],
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tensors(), path)
    found = probe(path)
    assert (found.type, found.base) == (kind, base)
    assert {name: found.details.get(name) for name in details} == details


def test_what_a_lora_says_it_is_counts_before_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    keys = named("anything.lora_A.weight", "anything.lora_B.weight")
    save_file(keys, path, metadata={"modelspec.architecture": "hunyuan-video/lora"})
    assert probe(path).base is Base.HUNYUAN_VIDEO


def test_the_patches_of_a_transformer_are_read_from_its_keys(checkpoint: Path) -> None:
    found = probe(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.base is Base.Z_IMAGE_VIDEO
    assert found.details["f_patch_sizes"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("animatediff", Base.SD_1),
        ("svd", Base.SVD),
        ("svd-xt", Base.SVD),
        ("hunyuan-video-concat", Base.HUNYUAN_VIDEO),
    ],
)
def test_a_folder_is_told_by_its_manifest(
    random_family: Callable[[str], Path], family: str, base: Base
) -> None:
    found = probe(random_family(family))
    assert (found.type, found.base) == (ModelType.MAIN, base)
    assert found.details["family"] == family.removesuffix("-concat")


@pytest.mark.parametrize(
    ("part", "kind", "base"),
    [
        ("motion_adapter", ModelType.MOTION_MODULE, Base.SD_1),
        ("vae", None, None),
    ],
)
def test_a_component_is_told_by_its_class(
    random_family: Callable[[str], Path], part: str, kind: ModelType | None, base: Base | None
) -> None:
    folder = random_family("animatediff") / part
    if kind is None:
        with pytest.raises(NotRecognised, match="AutoencoderKL"):
            probe(folder)
    else:
        found = probe(folder)
        assert (found.type, found.base) == (kind, base)


@pytest.mark.parametrize(
    "tensors", [named("foo.bar.weight"), named("foo.bar.lora_A.weight"), named("decoder.weight")]
)
def test_unknown_keys_are_not_guessed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with pytest.raises(NotRecognised):
        probe(path)


def test_pickles_and_torn_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"\x80")
    with pytest.raises(WeightsDamaged, match="pickled"):
        probe(tmp_path / "weights.ckpt")
    whole = tmp_path / "whole.safetensors"
    save_file(named("double_blocks.0.x"), whole)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(WeightsDamaged, match="shorter or longer"):
        probe(torn)
    with pytest.raises(NotRecognised, match="there is nothing"):
        probe(tmp_path / "none")


def test_all_checkpoints_below_a_folder_are_found(
    random_family: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "main").symlink_to(random_family("svd"))
    save_file(adapter(True, 32), tmp_path / "deep" / "er" / "motion.safetensors")
    (tmp_path / "deep" / "notes.txt").write_text("no model")
    (tmp_path / "deep" / "a.safetensors").write_bytes(b"torn")
    found = list(find_all(tmp_path))
    whole = [item for item in found if isinstance(item, Found)]
    assert {item.type for item in whole} == {ModelType.MAIN, ModelType.MOTION_MODULE}
    assert (len(whole), len(found)) == (2, 3), "what is damaged hides nothing"


def test_a_pickle_in_a_models_folder_is_refused(
    random_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "motion_adapter"
    shutil.copytree(random_family("animatediff") / "motion_adapter", folder)
    (folder / "more.ckpt").write_bytes(b"\x80")
    with pytest.raises(WeightsDamaged, match="pickled"):
        probe(folder)


@pytest.mark.parametrize(
    ("action", "path", "status", "told"),
    [
        ("probe", "models/demo", 0, '"base": "z-image-video"'),
        ("validate", "models/demo", 0, "deployable"),
        ("list", "models", 0, "models/demo"),
        ("probe", "README.md", 2, "neither a folder nor a safetensors file"),
        ("validate", "models/none", 2, "there is nothing"),
    ],
)
def test_the_command_exits_by_what_it_found(action: str, path: str, status: int, told: str) -> None:
    done = subprocess.run(
        [str(MUTOSCOPE), "models", action, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert told in done.stdout + done.stderr


def test_a_damaged_checkpoint_is_no_success(checkpoint: Path, tmp_path: Path) -> None:
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(b"torn")
    done = subprocess.run(
        [str(MUTOSCOPE), "models", "validate", str(weights)], capture_output=True, text=True
    )
    assert (done.returncode, "too short" in done.stderr) == (1, True)
