"""A published checkpoint gets the manifest that its publishers' own scripts amount to."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.catalog import load_model

MUTOSCOPE = Path(sys.executable).with_name("mutoscope")
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("animatediff", "AnimateDiffPipeline", "animatediff",
     {"num_frames": 16, "width": 512, "num_steps": 25, "guidance_scale": 8.0}),
    ("svd", "StableVideoDiffusionPipeline", "svd",
     {"num_frames": 14, "min_guidance_scale": 1.0, "guidance_scale": 2.5, "num_steps": 25}),
    ("svd-xt", "StableVideoDiffusionPipeline", "svd-xt",
     {"num_frames": 25, "min_guidance_scale": 1.5, "guidance_scale": 3.0, "num_steps": 30}),
    ("hunyuan-video", "HunyuanVideoPipeline", "hunyuan-video",
     {"num_frames": 129, "height": 720, "fps": 24, "num_steps": 50, "guidance_scale": 6.0}),
    ("hunyuan-video-concat", "HunyuanVideoImageToVideoPipeline", "hunyuan-video",
     {"guidance_scale": 1.0}),
]  # fmt: skip


def mutoscope(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([MUTOSCOPE, "models", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "pipeline", "family", "defaults"), CASES)
def test_the_manifest_is_the_publishers(
    random_family: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    pipeline: str,
    family: str,
    defaults: dict[str, Any],
) -> None:
    folder = tmp_path / name
    shutil.copytree(random_family(name), folder)
    (folder / "manifest.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    made = mutoscope("manifest", str(folder))
    assert (made.returncode, made.stderr) == (0, "")
    manifest = load_model(folder).manifest
    assert manifest.family == family
    found = manifest.defaults.model_dump()
    assert {key: found[key] for key in defaults} == defaults
    assert manifest.commercial_use is not family.startswith("svd")
    excluded = ("EU", "GB", "KR") if family == "hunyuan-video" else ()
    assert manifest.territory_exclusions == excluded
    assert manifest.sha256
    again = mutoscope("manifest", str(folder))
    assert again.returncode == 1
    assert "it is there already" in again.stderr


def test_a_part_has_no_manifest(random_family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(random_family("animatediff") / "motion_adapter", folder)
    made = mutoscope("manifest", str(folder))
    assert made.returncode == 2
    assert "not a whole pipeline" in made.stderr
    assert not (folder / "manifest.json").exists()
