"""In which numbers, with whose attention and from which weights a tier computes."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import attention, weights
from models.attention import probe_flash, probe_xformers, use_attention
from models.catalog import Model, load_model
from models.compute import Attention, Compute, ComputeUnavailable, Dtype, WeightStorage
from models.denoise import denoise
from models.lora import load_lora
from models.memory_profile import profile_memory
from models.spec import Use
from models.stages import load_denoiser, load_encoder
from models.weights import choose_dtype
from tests.unit.test_families import RandomFamily, png
from training.random_checkpoint import write_random_checkpoint
from training.random_families import write_random_lora

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = ["z-image-video", "animatediff", "svd", "hunyuan-video"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, checkpoint: Path, random_family: RandomFamily) -> Model:
    name = request.param
    return load_model(checkpoint if name == "z-image-video" else random_family(name))


def make(model: Model, compute: Compute) -> tuple[Any, Tensor]:
    """The denoiser, and what it makes of a request."""
    model = replace(model, compute=compute)
    request = model.resolve({"prompt": "a red circle", "seed": 1, "num_steps": 3})
    is_started = model.spec.start_image is Use.REQUIRED
    image = png(request.width, request.height) if is_started else None
    conditioning = load_encoder(model).encode(request, image)
    denoiser: Any = load_denoiser(model)
    *_, last = denoise(denoiser, request, conditioning)
    return denoiser, last.latents


def network(denoiser: Any) -> Any:
    unet = getattr(denoiser, "unet", None)
    return denoiser.transformer if unet is None else unet.unet


@pytest.mark.parametrize(
    ("capability", "asked", "chosen"),
    [
        (None, None, torch.float32),
        (None, Dtype.BFLOAT16, torch.bfloat16),
        ((7, 5), None, torch.float16),
        ((8, 6), None, torch.bfloat16),
        ((8, 0), Dtype.FLOAT16, torch.float16),
        ((7, 5), Dtype.BFLOAT16, None),
    ],
)
def test_each_gpu_computes_in_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    asked: Dtype | None,
    chosen: torch.dtype | None,
) -> None:
    """A T4 (7.5) has no bfloat16; asked for it, it is not given another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    device, compute = CPU if capability is None else CUDA, Compute(dtype=asked)
    if chosen is None:
        with pytest.raises(ComputeUnavailable, match="Tesla T4"):
            choose_dtype(device, compute)
    else:
        assert choose_dtype(device, compute) is chosen


def test_attention_that_is_not_there_is_refused_and_not_replaced(
    checkpoint: Path, random_family: RandomFamily
) -> None:
    by_xformers = Compute(attention=Attention.XFORMERS)
    for folder, reason in (
        (random_family("animatediff"), "xformers"),
        (random_family("svd"), "xformers"),
        (checkpoint, "xformers is for UNets"),
    ):
        with pytest.raises(ComputeUnavailable, match=reason):
            load_denoiser(replace(load_model(folder), compute=by_xformers))
    with pytest.raises(ComputeUnavailable):
        probe_xformers(CPU, torch.float32)
    with pytest.raises(ComputeUnavailable):
        probe_flash(CPU, torch.int32)


@pytest.mark.parametrize(
    ("capability", "works", "chosen"),
    [((7, 5), True, "xformers"), ((7, 5), False, "sdpa"), ((8, 0), True, "sdpa")],
)
def test_the_best_attention_is_probed_and_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    works: bool,
    chosen: str,
) -> None:
    """xformers where there is no flash attention and it works; else torch's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    def probe(*_: Any) -> None:
        if not works:
            raise ComputeUnavailable(Attention.XFORMERS, "no kernel image")

    monkeypatch.setattr(attention, "probe_xformers", probe)
    turned_on = []

    class Unet:
        down_blocks = ()

        def enable_xformers_memory_efficient_attention(self) -> None:
            turned_on.append(True)

    with caplog.at_level(logging.INFO, logger="models"):
        use_attention(Unet(), Compute(), CUDA, torch.float16)
    assert bool(turned_on) is (chosen == "xformers")
    assert f"attention by {chosen}, the best here" in caplog.text
    was_refused = capability == (7, 5) and not works
    assert ("no kernel image" in caplog.text) == was_refused


@pytest.mark.parametrize(("code", "raised"), [(209, ComputeUnavailable), (700, RuntimeError)])
def test_a_fault_of_the_gpu_is_not_taken_for_a_lack(
    monkeypatch: pytest.MonkeyPatch, code: int, raised: type[Exception]
) -> None:
    """xformers without an image for this GPU, and xformers at an illegal address."""

    def fail(*_: Any) -> None:
        error = torch.AcceleratorError("CUDA error")
        error.error_code = code  # type: ignore[attr-defined]
        raise error

    operators = ModuleType("xformers.ops")
    operators.memory_efficient_attention = fail  # type: ignore[attr-defined]
    package = ModuleType("xformers")
    package.ops = operators  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    with pytest.raises(raised) as found:
        probe_xformers(CPU, torch.float32)
    assert isinstance(found.value, ComputeUnavailable) is (code == 209)


def test_fused_attention_makes_the_same_and_never_falls_back(family: Model) -> None:
    """The negative control: what no fused kernel takes is an error while the network runs."""
    flash = Compute(attention=Attention.FLASH)
    denoiser, latents = make(family, flash)
    torch.testing.assert_close(latents, make(family, Compute())[1], atol=1e-5, rtol=1e-5)

    def ask(*_: Any) -> None:
        whole = torch.zeros(1, 1, 4, 4, dtype=torch.int32)
        F.scaled_dot_product_attention(whole, whole, whole)

    hook = network(denoiser).register_forward_pre_hook(ask)
    with pytest.raises(RuntimeError):
        make_again(denoiser, replace(family, compute=flash))
    hook.remove()
    torch.testing.assert_close(make_again(denoiser, family), latents)


def make_again(denoiser: Any, model: Model) -> Tensor:
    request = model.resolve({"prompt": "a red circle", "seed": 1, "num_steps": 3})
    is_started = model.spec.start_image is Use.REQUIRED
    image = png(request.width, request.height) if is_started else None
    conditioning = load_encoder(model).encode(request, image)
    *_, last = denoise(denoiser, request, conditioning)
    latents: Tensor = last.latents
    return latents


def test_offloaded_weights_make_the_same_to_the_bit(family: Model) -> None:
    _, latents = make(family, Compute(weights=WeightStorage.OFFLOADED))
    assert torch.equal(latents, make(family, Compute())[1])


def test_weights_in_eight_bits_change_little(family: Model) -> None:
    whole, expected = make(family, Compute())
    denoiser, latents = make(family, Compute(weights=WeightStorage.FP8))

    def stored(of: Any) -> dict[torch.dtype, int]:
        found: dict[torch.dtype, int] = {}
        for weight in network(of).parameters():
            found[weight.dtype] = found.get(weight.dtype, 0) + weight.numel()
        return found

    numbers = stored(denoiser)
    memory = profile_memory(family.folder, family.manifest).denoiser
    assert numbers == {
        torch.float8_e4m3fn: memory.rounded,
        torch.float32: memory.parameters - memory.rounded,
    }
    assert set(stored(whole)) == {torch.float32}
    change = (latents - expected).abs().mean() / expected.abs().mean()
    assert 0 < change < 0.3


def test_what_is_chosen_is_logged(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger=weights.__name__):
        load_denoiser(replace(load_model(checkpoint), compute=Compute(dtype=Dtype.BFLOAT16)))
    assert "ZImageTransformer2DModel: torch.bfloat16, weights whole" in caplog.text


@pytest.mark.parametrize("storage", [WeightStorage.FP8, WeightStorage.OFFLOADED])
def test_a_pass_that_ends_early_leaves_such_weights_as_they_were(
    storage: WeightStorage, tmp_path: Path
) -> None:
    write_random_checkpoint(tmp_path, dim=64, num_layers=3)
    model = replace(load_model(tmp_path), compute=Compute(weights=storage))
    fields = {"prompt": "a red circle", "seed": 1, "num_steps": 8}
    whole = model.resolve(fields)
    cache = {"by": "first_block", "threshold": 1.0, "warm_up": 2}
    skipping = model.resolve({**fields, "step_cache": cache})
    conditioning = load_encoder(model).encode(whole, None)
    denoiser = load_denoiser(model)
    (*_, expected), (*_, early) = (
        denoise(denoiser, request, conditioning) for request in (whole, skipping)
    )
    assert early.skipped > 0
    *_, again = denoise(denoiser, whole, conditioning)
    assert torch.equal(again.latents, expected.latents)
    assert not torch.equal(early.latents, expected.latents)


@pytest.mark.parametrize("storage", [WeightStorage.FP8, WeightStorage.OFFLOADED])
def test_loras_lie_beside_weights_however_these_are_kept(
    random_family: RandomFamily, storage: WeightStorage, tmp_path: Path
) -> None:
    write_random_lora(tmp_path / "ink.safetensors")
    model = load_model(random_family("animatediff"))
    model = replace(model, loras=(load_lora(tmp_path / "ink.safetensors", "ink"),))
    fields = {"prompt": "a red circle", "seed": 1, "num_steps": 2}
    plain = model.resolve(fields)
    inked = model.resolve({**fields, "loras": [{"name": "ink"}]})
    conditioning = load_encoder(model).encode(plain, None)

    def change(compute: Compute) -> Tensor:
        denoiser = load_denoiser(replace(model, compute=compute))
        (*_, without), (*_, beside) = (
            denoise(denoiser, request, conditioning) for request in (plain, inked)
        )
        made: Tensor = beside.latents - without.latents
        return made

    whole, kept = change(Compute()), change(Compute(weights=storage))
    assert whole.abs().mean() > 0
    # eight bits round what the LoRA is added to, and nothing of the LoRA
    allowed = 0.0 if storage is WeightStorage.OFFLOADED else 0.5
    assert (kept - whole).abs().mean() <= allowed * whole.abs().mean()
