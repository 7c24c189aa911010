"""The halves of LoRAs that change a text encoder: a request's texts alone, and no others'."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.catalog import Model, load_model
from models.embeddings import EmbeddingCache
from models.lora import Lora, LoraDoesNotFit
from models.stages import load_denoiser, load_encoder
from tests.unit.test_lora import CASES, SINGLE, changes_of, load, network

QUERY = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "keys",
    [
        ("lora_te_text_model_{_}.lora_down.weight", "lora_te_text_model_{_}.lora_up.weight"),
        ("text_encoder.text_model.{}.lora_A.weight", "text_encoder.text_model.{}.lora_B.weight"),
        (
            "text_encoder.text_model.{}.lora_linear_layer.down.weight",
            "text_encoder.text_model.{}.lora_linear_layer.up.weight",
        ),
    ],
)
def test_the_text_encoders_half_changes_its_texts_alone(
    random_family: Callable[[str], Path], save: Callable[..., Lora], keys: tuple[str, str]
) -> None:
    folder = random_family("animatediff")
    plain: Any = load_encoder(load_model(folder))
    stock = plain.pipeline.text_encoder
    down, up = changes_of(stock.get_submodule(QUERY), 1)
    name, *of_denoiser = CASES["animatediff, kohya"]
    layer = network(load(folder)).get_submodule(name)
    written = [key.replace("{}", QUERY).replace("{_}", QUERY.replace(".", "_")) for key in keys]
    written += [key.replace("{_}", name.replace(".", "_")) for key in of_denoiser]
    lora = save("x", dict(zip(written, (down, up, *changes_of(layer, 2)), strict=True)))
    model = replace(load_model(folder), loras=(lora,))
    encoder: Any = load_encoder(model)
    load_denoiser(model)
    cache = EmbeddingCache(1 << 20)
    ordinary, changed = (
        model.resolve({"prompt": "a red circle", "seed": 1, "loras": loras})
        for loras in ([], [{"name": "x", "weight": 0.5}])
    )
    expected = plain.encode(ordinary, None).positive
    with torch.no_grad():  # merged
        stock.get_submodule(QUERY).weight += 0.5 * up @ down
    expected_changed = plain.encode(ordinary, None).positive
    for request, states in (
        (ordinary, expected),
        (changed, expected_changed),
        (ordinary, expected),
    ):
        for kept in (None, cache.open("x")):
            found = encoder.encode(request, None, embeddings=kept).positive
            np.testing.assert_allclose(found, states, atol=1e-5)
    assert np.array_equal(encoder.encode(ordinary, None).positive, expected)
    assert np.abs(expected - expected_changed).max() > 1e-2


def test_requests_of_several_threads_each_have_their_own_text_loras(
    random_family: Callable[[str], Path], save: Callable[..., Lora]
) -> None:
    folder = random_family("animatediff")
    encoder: Any = load_encoder(load_model(folder))
    halves = changes_of(encoder.pipeline.text_encoder.get_submodule(QUERY), 1)
    keys = [f"text_encoder.text_model.{QUERY}.lora_{half}.weight" for half in "AB"]
    model = replace(load_model(folder), loras=(save("x", dict(zip(keys, halves, strict=True))),))
    encoder = load_encoder(model)
    requests = [
        model.resolve({"prompt": "x", "seed": 1, "loras": [{"name": "x", "weight": weight}]})
        for weight in (-2, 0.5, 3)
    ] * 8
    alone = [encoder.encode(request, None).positive for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: encoder.encode(request, None).positive, requests))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


def test_z_images_text_encoder_has_its_half_too(model: Model, save: Callable[..., Lora]) -> None:
    plain: Any = load_encoder(model)
    halves = changes_of(plain.text_encoder.get_submodule("layers.0.self_attn.q_proj"), 1)
    keys = [f"text_encoder.model.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"]
    keys += [f"transformer.layers.0.attention.to_q.lora_{half}.weight" for half in "AB"]
    denoiser: Any = load_denoiser(model)
    layer = denoiser.transformer.get_submodule("layers.0.attention.to_q")
    lora = save("x", dict(zip(keys, halves + changes_of(layer, 2), strict=True)))
    beside = replace(model, loras=(lora,))
    encoder: Any = load_encoder(beside)
    load_denoiser(beside)
    found = [
        encoder.encode(beside.resolve({"prompt": "x", "seed": 1, "loras": loras}), None).positive
        for loras in ([], [{"name": "x"}])
    ]
    assert np.array_equal(found[0], plain.encode(beside.resolve({"prompt": "x"}), None).positive)
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_a_family_whose_text_encoders_take_none_refuses_that_half(
    random_family: Callable[[str], Path], save: Callable[..., Lora]
) -> None:
    keys = [f"transformer.{SINGLE.split('.', 1)[1]}.proj_out.lora_{half}.weight" for half in "AB"]
    keys += [f"text_encoder.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"]
    layer = network(load(random_family("hunyuan-video"))).get_submodule(SINGLE[12:] + ".proj_out")
    tensors = dict(zip(keys, changes_of(layer, 1) * 2, strict=True))
    with pytest.raises(LoraDoesNotFit, match="fit no layer"):
        load(random_family("hunyuan-video"), save("x", tensors))
