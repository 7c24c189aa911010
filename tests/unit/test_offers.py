"""How the tiers of a configuration compute their models, and what memory these have there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from autoscaling.room import TierRoom
from autoscaling.tiers import GpuTier, ServedOn
from deployments.admission import Offer
from deployments.chain import _read_offers, check_weights, models_of, with_room, with_storage
from deployments.config import AppConfig, GpuConfig, ModelConfig, TierConfig
from models.catalog import Model
from models.compute import Attention, Compute, Dtype, WeightStorage
from models.control import load_control_net
from models.fit import USABLE, Gpus, decode_footprint, denoise_footprint
from models.memory_profile import profile_memory
from models.request import ControlKind
from training.random_controls import write_random_z_image_control

TIERS = [
    TierConfig(tier=GpuTier.T4, gpu=GpuConfig(memory_bytes=16 * 10**9)),
    TierConfig(
        tier=GpuTier.A100,
        gpu=GpuConfig(memory_bytes=40 * 10**9, count=8, decoder_beside=False),
        dtype=Dtype.FLOAT32,
        attention=Attention.FLASH,
    ),
    TierConfig(tier=GpuTier.LOCAL),
]
SERVED_ON = (
    ServedOn(tier=GpuTier.T4, weights=WeightStorage.FP8),
    ServedOn(tier=GpuTier.A100),
    ServedOn(tier=GpuTier.LOCAL),
)


@pytest.fixture
def offer(model: Model) -> Offer:
    memory = profile_memory(model.folder, model.manifest)
    known = model.manifest.model_copy(update={"memory": memory})
    return Offer(replace(model, manifest=known), SERVED_ON)


def test_each_tier_computes_a_model_in_its_own_way(offer: Offer) -> None:
    offers = {offer.model.id: offer}
    computed = [models_of(offers, tier)[0].compute for tier in TIERS]
    assert computed == [
        Compute(weights=WeightStorage.FP8),
        Compute(dtype=Dtype.FLOAT32, attention=Attention.FLASH),
        Compute(),
    ]


def test_only_tiers_whose_gpus_are_told_have_room(offer: Offer) -> None:
    (found,) = with_room({offer.model.id: offer}, TIERS).values()
    assert set(found.room) == {GpuTier.T4, GpuTier.A100}
    t4, a100 = found.room[GpuTier.T4], found.room[GpuTier.A100]
    assert (t4.gpus.dtype, t4.gpus.count, t4.decoder_beside) == (Dtype.FLOAT16, 1, True)
    assert (a100.gpus.dtype, a100.gpus.count, a100.decoder_beside) == (Dtype.FLOAT32, 8, False)
    assert t4.resident == t4.decoders == 0


def heavy(model: Model) -> Model:
    """With weights that are more than what is computed from them."""
    memory = model.manifest.memory
    assert memory is not None
    counts = {"parameters": 10**9, "rounded": 9 * 10**8, "fixed": 10**7}
    counts |= {"largest_layer": 10**6, "largest_block": 10**7}
    denoiser = memory.denoiser.model_copy(update=counts)
    known = {"memory": memory.model_copy(update={"denoiser": denoiser})}
    return replace(model, manifest=model.manifest.model_copy(update=known))


def test_what_nothing_is_said_of_lies_as_it_fits(offer: Offer) -> None:
    """Whole if it can, else in the first way in which its default request does."""
    offer = replace(offer, model=heavy(offer.model))
    default = offer.model.resolve({"prompt": "x", "seed": 0})
    needed = {
        way: denoise_footprint(
            replace(offer.model, compute=Compute(weights=way)), default, 1, Dtype.FLOAT16
        ).total
        for way in WeightStorage
    }
    ways = list(WeightStorage)
    assert sorted(needed, key=needed.__getitem__) == ways[::-1]
    served = replace(offer, served_on=(ServedOn(tier=GpuTier.T4),))

    decoder = decode_footprint(offer.model, default, Dtype.FLOAT16).total
    assert decoder < min(needed.values())

    def decided(total: float, offer: Offer = served) -> WeightStorage | None:
        gpu = GpuConfig(memory_bytes=int((total + decoder) / USABLE) + 1)
        tier = TierConfig(tier=GpuTier.T4, gpu=gpu, dtype=Dtype.FLOAT16)
        (found,) = with_storage({"x": offer}, [tier]).values()
        return found.served_on[0].weights

    assert [decided(needed[way]) for way in ways] == ways
    # beside as much again of another model the same GPU has no room for whole weights
    other = replace(offer, model=replace(offer.model, id="other"), served_on=served.served_on)
    memory = 2 * needed[WeightStorage.WHOLE] + 2 * decoder
    tier = TierConfig(
        tier=GpuTier.T4, gpu=GpuConfig(memory_bytes=int(memory * 0.9)), dtype=Dtype.FLOAT16
    )
    both = with_storage({offer.model.id: served, "other": other}, [tier])
    assert [each.served_on[0].weights for each in both.values()] != [WeightStorage.WHOLE] * 2
    asked = replace(offer, served_on=(ServedOn(tier=GpuTier.T4, weights=WeightStorage.WHOLE),))
    assert decided(needed[WeightStorage.FP8], asked) is WeightStorage.WHOLE
    (untold,) = with_storage({"x": served}, [TierConfig(tier=GpuTier.T4)]).values()
    assert untold.served_on[0].weights is WeightStorage.WHOLE


def test_frames_are_tiled_where_they_fit_no_other_way(offer: Offer) -> None:
    request = offer.model.resolve({"prompt": "x", "seed": 0, "width": 512, "height": 512})
    whole, tile = (
        decode_footprint(offer.model, request, Dtype.FLOAT32, in_tiles=in_tiles).total
        for in_tiles in (False, True)
    )
    assert tile < whole
    for memory, above, in_tiles, fits in (
        (whole, None, False, True),
        (whole, 256**2, True, True),
        ((whole + tile) / 2, None, True, True),
        ((whole + tile) / 2, 512**2, False, False),
        (tile * 0.9, None, True, False),
    ):
        gpus = Gpus(int(memory / USABLE) + 1, 1, Dtype.FLOAT32)
        room = TierRoom(gpus, tiled_above=above)
        assert room.tiles(offer.model, request) is in_tiles
        assert room.decodes(offer.model, request) is fits


def test_fetched_weights_do_not_go_with_networks_that_share_them(
    offer: Offer, tmp_path: Path
) -> None:
    check_weights(offer)
    write_random_z_image_control(offer.model.folder / "transformer", tmp_path / "net")
    net = load_control_net(tmp_path / "net", "net", (ControlKind.CANNY,))
    led = replace(offer, model=replace(offer.model, controls=(net,)))
    check_weights(led)
    fetched = (ServedOn(tier=GpuTier.T4, weights=WeightStorage.OFFLOADED),)
    check_weights(replace(offer, served_on=fetched))
    with pytest.raises(ValueError, match="share layers"):
        check_weights(replace(led, served_on=fetched))


def test_a_lora_goes_to_the_models_that_are_named(checkpoint: Path, tmp_path: Path) -> None:
    key = "transformer.layers.0.attention.to_q"
    halves = {f"{key}.lora_{half}.weight": np.zeros((2, 2), np.float32) for half in "AB"}
    save_file(halves, tmp_path / "ink.safetensors")
    served = {"served_on": [{"tier": "local"}]}

    def goes_to(**named: list[str]) -> dict[str, int]:
        config = AppConfig.model_validate(
            {
                "models": [{"path": str(checkpoint), "id": name, **served} for name in ("a", "b")],
                "loras": [{"id": "ink", "path": str(tmp_path / "ink.safetensors"), **named}],
                "tiers": [{"tier": "local"}],
            }
        )
        offers = _read_offers(config, tmp_path)
        return {name: len(offer.model.loras) for name, offer in offers.items()}

    assert goes_to() == {"a": 1, "b": 1}
    assert goes_to(models=["b"]) == {"a": 0, "b": 1}
    with pytest.raises(ValueError, match="no model of c here"):
        goes_to(models=["c"])


def test_a_model_names_a_tier_once() -> None:
    twice = (ServedOn(tier=GpuTier.T4, max_area=4096), ServedOn(tier=GpuTier.T4))
    with pytest.raises(ValidationError, match="names a tier twice"):
        AppConfig(models=[ModelConfig(path="x", served_on=twice)], tiers=TIERS)
