"""LoRAs change a request's layers and nothing else, whatever the layout of their keys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from models.catalog import Model, load_model
from models.checkpoint import model_revision
from models.lora import Lora, LoraDoesNotFit, load_lora
from models.lora_layers import LoraLayers
from models.probe import Base, NotRecognised
from models.request import InvalidRequest, LoraUse
from models.spec import WeightsDamaged
from models.stages import load_denoiser

RANK = 2
SINGLE = "transformer.single_transformer_blocks.0"
Tensors = dict[str, Tensor]


def load(folder: Path, *loras: Lora) -> Any:
    """The denoiser's network, with LoRAs beside it."""
    denoiser: Any = load_denoiser(replace(load_model(folder), loras=loras))
    return denoiser


def network(denoiser: Any) -> Any:
    return denoiser.unet.unet if hasattr(denoiser, "unet") else denoiser.transformer


def changes_of(layer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Down- and up-projection of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, layer.in_features, generator=generator)
    return down, torch.randn(layer.out_features, RANK, generator=generator)


CASES = {
    "animatediff": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.{}.lora_A.weight", "unet.{}.lora_B.weight",
    ),
    "animatediff, kohya": (
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight",
    ),
    "animatediff, motion": (
        "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q",
        "{processor}.to_q_lora.down.weight", "{processor}.to_q_lora.up.weight",
    ),
    "hunyuan-video": (
        "single_transformer_blocks.0.proj_out",
        "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight",
    ),
    "hunyuan-video, original": (
        "transformer_blocks.0.attn.to_out.0",
        "diffusion_model.double_blocks.0.img_attn_proj.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn_proj.lora_B.weight",
    ),
    "hunyuan-video, kohya": (
        "transformer_blocks.0.ff_context.net.2",
        "lora_unet_double_blocks_0_txt_mlp_fc2.lora_down.weight",
        "lora_unet_double_blocks_0_txt_mlp_fc2.lora_up.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_layer_adds_its_low_rank_change(
    random_family: Callable[[str], Path], save: Callable[..., Lora], case: str
) -> None:
    family = case.split(",")[0]
    name, *keys = CASES[case]
    folder = random_family(family)
    stock = network(load(folder)).get_submodule(name)
    down, up = changes_of(stock, 1)
    processor = name.removesuffix(".to_q") + ".processor"
    written = [
        key.replace("{}", name).replace("{_}", name.replace(".", "_"))
        .replace("{processor}", processor)
        for key in keys
    ]  # fmt: skip
    denoiser = load(folder, save("x", dict(zip(written, (down, up), strict=True))))
    layer = network(denoiser).get_submodule(name)
    given = torch.randn(3, stock.in_features)
    with torch.no_grad():
        plain = stock(given)
        assert torch.equal(layer(given), plain), "off"
        denoiser.loras.use([LoraUse(name="x", weight=0.5)])
        torch.testing.assert_close(layer(given), plain + 0.5 * given @ down.T @ up.T)
        denoiser.loras.use([])
        assert torch.equal(layer(given), plain), "off again"


@pytest.mark.parametrize("kohya", [False, True])
def test_layers_that_diffusers_has_apart_each_get_their_rows(
    random_family: Callable[[str], Path], save: Callable[..., Lora], kohya: bool
) -> None:
    """Query, key and value in one, and in single blocks the MLP with them; alpha scales all."""
    folder = random_family("hunyuan-video")
    stock = network(load(folder))
    block = "single_transformer_blocks.0"
    parts = [f"{block}.attn.to_{kind}" for kind in "qkv"] + [f"{block}.proj_mlp"]
    sizes = [stock.get_submodule(part).out_features for part in parts]
    width = stock.get_submodule(parts[0]).in_features
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(RANK, width, generator=generator)
    up = torch.randn(sum(sizes), RANK, generator=generator)
    if kohya:
        name = "lora_unet_single_blocks_0_linear1"
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    else:
        name = "transformer.single_blocks.0.linear1"
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    denoiser = load(folder, save("x", tensors))
    denoiser.loras.use([LoraUse(name="x")])
    given = torch.randn(3, width)
    for part, rows in zip(parts, up.split(sizes), strict=True):
        with torch.no_grad():
            change = network(denoiser).get_submodule(part)(given) - stock.get_submodule(part)(given)
        scale = 1.0 / RANK if kohya else 1.0
        torch.testing.assert_close(change, scale * given @ down.T @ rows.T, atol=1e-4, rtol=1e-4)


def test_several_add_up_and_each_request_has_its_own(
    random_family: Callable[[str], Path], save: Callable[..., Lora]
) -> None:
    folder = random_family("svd")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    stock = network(load(folder)).get_submodule(name)
    loras, products = [], []
    for index in range(2):
        down, up = changes_of(stock, index)
        tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        loras.append(save(f"lora{index}", tensors))
        products.append(down.T @ up.T)
    denoiser = load(folder, *loras)
    layer = network(denoiser).get_submodule(name)
    given = torch.randn(3, stock.in_features)
    for weights in ((1.0, 0.5), (0.0, -2.0), (None, 1.0), (1.0, None)):
        uses = [
            LoraUse(name=f"lora{index}", weight=weight)
            for index, weight in enumerate(weights)
            if weight is not None
        ]
        denoiser.loras.use(uses)
        expected = sum(
            (given @ product) * (weight or 0.0)
            for product, weight in zip(products, weights, strict=True)
        )
        with torch.no_grad():
            torch.testing.assert_close(layer(given) - stock(given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            {
                f"{SINGLE[:-1]}9.proj_out.lora_A.weight": torch.zeros(2, 4),
                f"{SINGLE[:-1]}9.proj_out.lora_B.weight": torch.zeros(4, 2),
            },
            "fit no layer",
        ),
        (
            {f"{SINGLE}.proj_out.lora_A.weight": torch.zeros(2, 4)},
            "half of",
        ),
        (
            {
                f"{SINGLE}.proj_out.lora_A.weight": torch.zeros(2, 4),
                f"{SINGLE}.proj_out.lora_B.weight": torch.zeros(4, 2),
            },
            "is not for",
        ),
        (
            {
                f"{SINGLE}.proj_out.lora_A.weight": torch.zeros(2, 4),
                f"{SINGLE}.proj_out.lora_B.weight": torch.zeros(32, 2),
            },
            "can't be changed by",
        ),
        (
            {  # rows of one of the three: not for the query alone
                "double_blocks.0.img_attn_qkv.lora_A.weight": torch.zeros(2, 32),
                "double_blocks.0.img_attn_qkv.lora_B.weight": torch.zeros(32, 2),
            },
            "is not for",
        ),
        (
            {
                "double_blocks.0.img_attn_qkv.lora_A.weight": torch.zeros(2, 32),
                "double_blocks.0.img_attn_qkv.lora_B.weight": torch.zeros(96, 2),
                "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32),
                "transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 2),
            },
            "changed by two",
        ),
        (
            {
                "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32),
                "transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 2),
                "transformer_blocks.0.attn.to_q": torch.zeros(32),
            },
            "fit no layer",
        ),
    ],
)
def test_what_fits_no_layer_is_refused_at_deploy(
    random_family: Callable[[str], Path], save: Callable[..., Lora], tensors: Tensors, told: str
) -> None:
    with pytest.raises(LoraDoesNotFit, match=told):
        load(random_family("hunyuan-video"), save("x", tensors))


ORIGINAL = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.attentions.0.proj_in": "input_blocks_1_1_proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q":
        "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_3_0_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2":
        "middle_block_1_transformer_blocks_0_ff_net_2",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.resnets.1.conv_shortcut": "output_blocks_1_0_skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_1_conv",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0":
        "output_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_1": "time_embed_0",
}  # fmt: skip


def test_stabilitys_own_names_are_the_same_layers(
    random_family: Callable[[str], Path], save: Callable[..., Lora]
) -> None:
    folder = random_family("animatediff")
    unet = network(load(folder))
    tensors: Tensors = {}
    for number, (layer, name) in enumerate(ORIGINAL.items()):
        for half, tensor in zip(
            ("down", "up"), conv_changes(unet.get_submodule(layer), number), strict=True
        ):
            tensors[f"lora_unet_{name}.lora_{half}.weight"] = tensor
    lora = save("x", tensors)
    assert lora.base is Base.SD_1
    tuned = network(load(folder, lora))
    assert {
        layer for layer in ORIGINAL if isinstance(tuned.get_submodule(layer), BaseTunerLayer)
    } == {*ORIGINAL}


def conv_changes(layer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Of a convolution: its own kernel down, one of a pixel up."""
    if isinstance(layer, nn.Linear):
        return changes_of(layer, seed)
    down = torch.randn(RANK, layer.in_channels, *layer.kernel_size)
    return down, torch.randn(layer.out_channels, RANK, 1, 1)


def test_only_loras_of_the_base_are_offered(
    random_family: Callable[[str], Path], save: Callable[..., Lora]
) -> None:
    key = "transformer.single_transformer_blocks.0.proj_out"
    halves = {f"{key}.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    lora = save("x", halves)
    assert lora.base is Base.HUNYUAN_VIDEO
    assert lora.fits(load_model(random_family("hunyuan-video-concat")))
    assert not lora.fits(load_model(random_family("animatediff")))
    named = save("y", halves, **{"modelspec.architecture": "hunyuan-video/lora"})
    assert named.base is Base.HUNYUAN_VIDEO


def test_what_is_no_lora_is_refused(random_family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = random_family("animatediff")
    with pytest.raises(WeightsDamaged, match="not a LoRA"):
        load_lora(folder / "motion_adapter", "x")
    save_file({"a.b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(NotRecognised):
        load_lora(tmp_path / "x.safetensors", "x")


def test_requests_name_what_is_there(model: Model, save: Callable[..., Lora]) -> None:
    key = "transformer.layers.0.attention.to_q"
    halves = {f"{key}.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    beside = replace(model, loras=(save("ink", halves),))
    use = {"name": "ink", "weight": 0.7}
    assert beside.resolve({"prompt": "x", "loras": [use]}).loras == (LoraUse(**use),)
    for wrong in ([{"name": "oil"}], [use, use], [{"name": "ink", "weight": 5}], [{"weight": 1}]):
        with pytest.raises(InvalidRequest) as refused:
            beside.resolve({"prompt": "x", "loras": wrong})
        assert str(refused.value.param).startswith("loras")
    assert model_revision(beside) != model_revision(model)
    assert beside.denoiser_bytes > model.denoiser_bytes


def test_a_model_without_loras_has_no_layers_in_the_way() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    LoraLayers(plain, ())
    assert type(plain[0]) is nn.Linear
