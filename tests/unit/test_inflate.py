"""An image checkpoint becomes a video checkpoint that shows the image, still."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

from models.catalog import load_model
from models.denoise import denoise
from models.inflate import inflate, inflate_transformer
from models.probe import NotRecognised
from models.spec import WeightsMissing
from models.stages import load_decoder, load_denoiser, load_encoder
from training.random_checkpoint import make_image_vae

MUTOSCOPE = Path(sys.executable).with_name("mutoscope")


@pytest.fixture(scope="module")
def image_model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=128,
        axes_dims=[8, 12, 12],
        axes_lens=[512, 64, 64],
    )


@pytest.fixture
def image_checkpoint(
    image_model: ZImageTransformer2DModel, checkpoint: Path, tmp_path: Path
) -> Path:
    """In the layout of the published one, with an image's VAE."""
    folder = tmp_path / "z-image"
    for part in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(checkpoint / part, folder / part)
    image_model.save_pretrained(folder / "transformer")
    make_image_vae(4).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    return folder


@pytest.mark.parametrize("f_patch_size", [1, 2, 4])
def test_a_static_clip_is_what_the_image_model_makes_of_its_frame(
    image_model: ZImageTransformer2DModel, f_patch_size: int
) -> None:
    video = inflate_transformer(image_model)
    latents = torch.randn(4, 1, 8, 8)
    text, time = torch.randn(9, 128), torch.tensor([0.4])

    def run(model: Any, frames: int, size: int) -> torch.Tensor:
        clip = latents.repeat(1, frames, 1, 1)
        with torch.no_grad():
            out: torch.Tensor = model([clip], time, [text], f_patch_size=size).sample[0]
        return out

    image = run(image_model, 1, 1)
    clip = run(video, f_patch_size, f_patch_size)
    assert (clip - image).abs().max() <= 1e-5
    with torch.no_grad():
        name = f"all_x_embedder.2-{f_patch_size}.weight"
        video.get_parameter(name).mul_(1.01)
    assert (run(video, f_patch_size, f_patch_size) - image).abs().max() > 1e-4


def test_an_inflated_checkpoint_runs_and_says_that_it_is_untrained(
    image_checkpoint: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(MUTOSCOPE), "models", "inflate", str(image_checkpoint)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    target = tmp_path / "z-image-video"
    assert done.stdout.strip() == str(target)
    model = load_model(target)
    assert (model.manifest.trained, model.spec.f_patch_sizes) == (False, (1, 2, 4))
    assert (model.spec.frame_stride, model.spec.in_tiles) == (1, False)
    fields = {"width": 34, "height": 64, "num_frames": 6, "num_steps": 2, "seed": 1}
    request = model.resolve({"prompt": "a box", "f_patch_size": 4, **fields})
    assert model.spec.generated_frames(6, 4) == 8
    source = np.random.default_rng(0).integers(0, 255, (6, 64, 34, 3), np.uint8)
    conditioning = load_encoder(model).encode(request, None, source)
    assert conditioning.source_latents.shape == (4, 8, 8, 6)
    *_, last = denoise(load_denoiser(model), request, conditioning)
    chunks = list(load_decoder(model).decode(request, last.latents.numpy()))
    assert np.concatenate([frames.pixels for frames in chunks]).shape == (6, 64, 34, 3)


def test_only_whole_image_checkpoints_are_inflated(
    image_checkpoint: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotRecognised):
        inflate(checkpoint, tmp_path / "out", "none")
    shutil.rmtree(image_checkpoint / "vae")
    with pytest.raises((WeightsMissing, FileNotFoundError)):
        inflate(image_checkpoint, tmp_path / "out", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["z-image"]
    (tmp_path / "z-image-video").mkdir()
    done = subprocess.run(
        [str(MUTOSCOPE), "models", "inflate", str(image_checkpoint)], capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "is there already" in done.stderr
