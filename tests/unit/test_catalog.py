"""A checkpoint is whole or refused by file name; a request is complete or refused by field."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.catalog import Model, load_model
from models.request import InvalidRequest, ModelFamily
from models.spec import WeightsDamaged, WeightsMissing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(checkpoint, folder)
    return folder


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_the_shipped_model_is_whole_small_and_free_of_pickles() -> None:
    folder = ROOT / "models" / "demo"
    model = load_model(folder)
    assert model.manifest.trained
    assert model.spec.f_patch_sizes == (1, 2, 4)
    assert (model.spec.frame_stride, model.spec.size_multiple) == (4, 16)
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed = set(model.manifest.sha256)
    assert {path.relative_to(folder).as_posix() for path in files} - listed == {
        "manifest.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_a_missing_file_is_named(copied: Path) -> None:
    weights(copied).unlink()
    with pytest.raises(WeightsMissing, match="transformer"):
        load_model(copied)


def test_a_missing_manifest_is_named(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(WeightsMissing, match=r"manifest\.json"):
        load_model(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    content = weights(copied).read_bytes()
    for length in (4, 100, len(content) - 1):
        weights(copied).write_bytes(content[:length])
        with pytest.raises(WeightsDamaged, match=r"transformer/diffusion.*safetensors"):
            load_model(copied)


def test_a_flipped_byte_is_found_by_the_check_sum(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(ROOT / "models" / "demo", folder)
    content = bytearray(weights(folder).read_bytes())
    content[-1] ^= 1
    weights(folder).write_bytes(content)
    with pytest.raises(WeightsDamaged, match="SHA-256"):
        load_model(folder)


def test_pickled_weights_are_refused(copied: Path) -> None:
    (copied / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(WeightsDamaged, match="pickled"):
        load_model(copied)


@pytest.mark.parametrize("content", ["{", "[]", '{"family": "z-image-video"}'])
def test_a_broken_manifest_is_refused(copied: Path, content: str) -> None:
    (copied / "manifest.json").write_text(content)
    with pytest.raises(WeightsDamaged, match=r"manifest\.json"):
        load_model(copied)


@pytest.mark.parametrize(
    ("asked", "f_patch_size", "generated"),
    [
        (1, 1, 1), (1, 2, 5), (2, 1, 5), (13, 1, 13), (13, 2, 13), (13, 4, 13), (14, 1, 17),
        (14, 2, 21), (14, 4, 29), (16, 1, 17), (17, 2, 21), (48, 1, 49), (48, 4, 61),
    ],
)  # fmt: skip
def test_generated_frames_fill_whole_patches(
    model: Model, asked: int, f_patch_size: int, generated: int
) -> None:
    frames = model.spec.generated_frames(asked, f_patch_size)
    assert frames == generated
    assert frames % 4 == 1
    assert ((frames - 1) // 4 + 1) % f_patch_size == 0


def test_generated_sizes_are_the_next_multiples(model: Model) -> None:
    assert model.spec.generated_size(64, 64) == (64, 64)
    assert model.spec.generated_size(66, 50) == (80, 64)


def test_a_prompt_alone_is_a_whole_request(model: Model) -> None:
    request = model.resolve({"prompt": "x"})
    assert request.family is ModelFamily.Z_IMAGE_VIDEO
    assert (request.num_frames, request.width, request.fps) == (13, 64, 8)
    assert request.seed != model.resolve({"prompt": "x"}).seed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 130}, "num_frames"),
        ({"num_frames": "many"}, "num_frames"),
        ({"f_patch_size": 3}, "f_patch_size"),
        ({"width": 65}, "size"),
        ({"height": 14}, "size"),
        ({"width": 514}, "size"),
        ({"fps": 0}, "fps"),
        ({"fps": 61}, "fps"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 201}, "num_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_field_out_of_range_is_named(model: Model, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        model.resolve({"prompt": "x", **fields})
    assert refused.value.param == param


def test_a_file_that_differs_from_its_check_sum_is_named(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["sha256"] = {"vae/config.json": "0" * 64}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsDamaged, match=r"vae/config\.json"):
        load_model(copied)
