"""FreeNoise: more frames than a motion module tells apart, in windows, and nothing else changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline

from bench import stock_pipelines
from models.catalog import load_model
from models.compute import Compute, WeightStorage
from models.control import load_control_net
from models.denoise import denoise
from models.free_noise import WindowedBlock, shuffle_noise
from models.request import ControlKind, FreeNoise, InvalidRequest
from models.stages import load_denoiser, load_encoder
from tests.unit.test_families import make, stock
from training.random_controls import write_random_sparse_control

RandomFamily = Callable[[str], Path]
WINDOWS = {"context_length": 8, "context_stride": 4}


def a_block(**windows: int) -> WindowedBlock:
    torch.manual_seed(0)
    return WindowedBlock(
        dim=8,
        num_attention_heads=2,
        attention_head_dim=4,
        double_self_attention=True,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=16,
        **windows,
    ).eval()


class OneText(AnimateDiffPipeline):
    """The stock pipeline, but that it encodes the text once, as for few frames: it encodes it for
    the first frame and for the last at once, and interpolates, which rounds otherwise.
    """

    def _encode_prompt_free_noise(self, prompt: str, num_frames: int, **given: Any) -> Any:
        device, copies = given["device"], given["num_videos_per_prompt"]
        positive, negative = self.encode_prompt(prompt, device, copies, True)
        return torch.cat([negative, positive]).repeat_interleave(num_frames, dim=0), None


@pytest.mark.parametrize("num_frames", [12, 40])
def test_a_long_video_equals_the_stock_pipeline_to_the_bit(
    random_family: RandomFamily, num_frames: int
) -> None:
    folder = random_family("animatediff")
    fields: dict[str, Any] = {"num_frames": num_frames, "guidance_scale": 4.0}
    made = make(folder, num_steps=3, free_noise=WINDOWS, **fields)
    pipeline = stock_pipelines.animatediff(folder, pipeline=OneText)
    for stride, is_the_same in ((4, True), (2, False)):
        pipeline.enable_free_noise(context_length=8, context_stride=stride)
        stock_pipelines.prepared(pipeline)  # some of its blocks are new
        latents, _ = stock(pipeline, made, prompt=made.request.prompt, **fields)
        assert torch.equal(made.latents, latents) is is_the_same


def test_a_frame_is_the_weighted_mean_of_its_windows_however_many_are_left_over() -> None:
    """Upstream divides what it has of the last ones by a weight that is not theirs."""
    block = a_block(context_length=8, context_stride=4)
    hidden = torch.randn(3, 14, 8)
    with torch.no_grad():
        made = block(hidden)
        total, weights = torch.zeros_like(hidden), torch.zeros(1, 14, 1)
        pyramid = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])[None, :, None]
        for first in (0, 4, 6):
            window = hidden[:, first : first + 8]
            window = window + block.attn1(block.pos_embed(block.norm1(window)))
            window = window + block.attn2(block.pos_embed(block.norm2(window)))
            total[:, first : first + 8] += window * pyramid
            weights[:, first : first + 8] += pyramid
        expected = total / weights
        expected = expected + block.ff(block.norm3(expected))
        assert (made - expected).abs().max() <= 1e-5
        upstream = FreeNoiseTransformerBlock.__new__(FreeNoiseTransformerBlock)
        upstream.__dict__ = block.__dict__
        assert (upstream(hidden)[:, :12] - made[:, :12]).abs().max() <= 2.0
        assert (upstream(hidden)[:, 13] - expected[:, 13]).abs().max() > 0.1


def test_noise_is_shuffled_within_strides_and_only_behind_the_first_window() -> None:
    noise = torch.arange(22.0).view(1, 1, 22, 1, 1)
    windows = FreeNoise(context_length=8, context_stride=4)
    made = shuffle_noise(noise, windows, torch.Generator().manual_seed(0)).flatten().tolist()
    assert made[:8] == list(range(8))
    for start in range(8, 20, 4):
        assert sorted(made[start : start + 4]) == sorted(made[start - 8 : start - 4])
    assert set(made[20:]) < set(made[12:16])
    assert made != noise.flatten().tolist()


def test_a_request_without_it_is_made_as_if_there_had_been_none(
    random_family: RandomFamily,
) -> None:
    model = load_model(random_family("animatediff"))
    encoder = load_encoder(model)
    plain = model.resolve({"prompt": "x", "seed": 1, "num_frames": 6})
    long = model.resolve({"prompt": "x", "seed": 1, "num_frames": 18, "free_noise": WINDOWS})
    told = encoder.encode(plain, None)
    denoiser = load_denoiser(model)
    (*_, first) = denoise(denoiser, plain, told)
    # a step of each in turn, as the step scheduler may have it
    other, state = denoiser.start(long, told), denoiser.start(plain, told)
    while state.step < state.num_steps:
        other = denoiser.step(long, told, other)
        state = denoiser.step(plain, told, state)
    assert torch.equal(state.latents, first.latents)
    assert torch.equal(other.latents, list(denoise(denoiser, long, told))[-1].latents)


def test_fetched_weights_make_the_same(random_family: RandomFamily) -> None:
    model = load_model(random_family("animatediff"))
    request = model.resolve({"prompt": "x", "seed": 1, "num_frames": 13, "free_noise": WINDOWS})
    told = load_encoder(model).encode(request, None)
    found = [
        list(denoise(load_denoiser(replace(model, compute=compute)), request, told))[-1].latents
        for compute in (Compute(), Compute(weights=WeightStorage.OFFLOADED))
    ]
    assert torch.equal(*found)


def test_a_long_video_is_changed_in_windows(random_family: RandomFamily) -> None:
    folder = random_family("animatediff")
    source = np.random.default_rng(1).integers(0, 255, (40, 64, 64, 3), np.uint8)
    made = [
        make(folder, source, num_frames=40, num_steps=3, strength=0.7, free_noise=windows).latents
        for windows in (WINDOWS, {**WINDOWS, "context_stride": 2})
    ]
    assert made[0].shape[2] == 40
    assert (made[0] - made[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"num_frames": 40}, "num_frames", "1 to 32"),
        ({"num_frames": 8, "free_noise": WINDOWS}, "num_frames", "9 to 128"),
        ({"num_frames": 129, "free_noise": WINDOWS}, "num_frames", "with this free_noise"),
        ({"num_frames": 40, "free_noise": {"context_length": 33}}, "free_noise", "at most 32"),
        (
            {"num_frames": 40, "free_noise": {"context_length": 8, "context_stride": 9}},
            "free_noise",
            "at most context_length",
        ),
        ({"num_frames": 40, "free_noise": {"length": 8}}, "free_noise.length", "Extra"),
    ],
)
def test_what_it_can_not_do_is_told(
    random_family: RandomFamily, fields: dict[str, Any], param: str, match: str
) -> None:
    with pytest.raises(InvalidRequest, match=match) as told:
        load_model(random_family("animatediff")).resolve({"prompt": "x", **fields})
    assert told.value.param == param


def test_it_is_of_one_family_and_goes_with_no_sparse_control(
    random_family: RandomFamily, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="means nothing to svd"):
        load_model(random_family("svd")).resolve({"prompt": "", "free_noise": WINDOWS})
    write_random_sparse_control(tmp_path / "net")
    net = load_control_net(tmp_path / "net", "net", (ControlKind.RGB,))
    model = replace(load_model(random_family("animatediff")), controls=(net,))
    fields = {"prompt": "x", "num_frames": 40, "free_noise": WINDOWS}
    model.resolve(fields)
    for more in ({"start_image": "x"}, {"control": {"type": "rgb", "frames": [0]}}):
        with pytest.raises(InvalidRequest, match="no more frames than fit at once"):
            model.resolve({**fields, **more})
