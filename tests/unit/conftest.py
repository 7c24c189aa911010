"""Models with control networks beside them, and LoRAs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from models.catalog import Model, load_model
from models.control import load_control_net
from models.lora import Lora, load_lora
from models.request import ControlKind
from tests.unit.test_families import RandomFamily
from training.random_controls import (
    write_random_controlnet,
    write_random_sparse_control,
    write_random_z_image_control,
)


def with_control(model: Model, folder: Path, *kinds: str) -> Model:
    net = load_control_net(folder, folder.name, tuple(map(ControlKind, kinds)))
    assert net.fits(model)
    return replace(model, controls=(*model.controls, net))


@pytest.fixture(scope="module")
def z_image(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With a control of canny and depth."""
    folder = tmp_path_factory.mktemp("controls") / "union"
    write_random_z_image_control(checkpoint / "transformer", folder)
    return with_control(load_model(checkpoint), folder, "canny", "depth")


@pytest.fixture(scope="module")
def animatediff(random_family: RandomFamily, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("controls")
    write_random_controlnet(folder / "canny")
    write_random_sparse_control(folder / "rgb")
    write_random_sparse_control(folder / "scribble", latents=False)
    model = load_model(random_family("animatediff"))
    for name in ("canny", "rgb", "scribble"):
        model = with_control(model, folder / name, name)
    return model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Lora]:
    """Writes a LoRA's file, and reads what it is."""

    def write(name: str, tensors: dict[str, Tensor], **metadata: str) -> Lora:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.clone() for key, value in tensors.items()}, path, metadata or None)
        return load_lora(path, name)

    return write
