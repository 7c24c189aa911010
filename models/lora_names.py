"""The names that LoRA files have for the layers of diffusers' and transformers' classes."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from torch import nn
from transformers import CLIPTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

IN_MIDDLE = re.compile(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)")
IN_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
# Of Stable Diffusion's original code, within its blocks and besides them.
IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_out": "out.2",
}


def names_of(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """The model's layers by every name that files have for them."""
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in layers}
    if isinstance(model, HunyuanVideoTransformer3DModel):
        names |= {name: parts for name, parts in _original_hunyuan(model) if parts[0] in layers}
    elif isinstance(model, UNetMotionModel):
        names |= {name: (layer,) for name, layer in _original_unet(model, layers)}
    elif isinstance(model, CLIPTextModel):  # as it was built when most LoRAs were made
        names |= {f"text_model.{name}": (name,) for name in layers}
    elif isinstance(model, Qwen3Model):  # as it is in what it is published as
        names |= {f"model.{name}": (name,) for name in layers}
    # kohya joins by underscores, and lets ".0" of to_out away in some versions
    for name, parts in list(names.items()):
        names.setdefault(name.replace(".", "_"), parts)
        names.setdefault(name.removesuffix(".0"), parts)
        names.setdefault(name.removesuffix(".0").replace(".", "_"), parts)
    return names


def _original_hunyuan(
    model: HunyuanVideoTransformer3DModel,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Tencent's names of the blocks' layers, and what diffusers made of each."""
    for index in range(len(model.transformer_blocks)):
        old, new = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for side, query, out, norm, feed in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm1", "ff"),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                "norm1_context",
                "ff_context",
            ),
        ):
            yield f"{old}.{side}_attn_qkv", tuple(f"{new}.attn.{name}" for name in query)
            yield f"{old}.{side}_attn_proj", (f"{new}.attn.{out}",)
            yield f"{old}.{side}_mod.linear", (f"{new}.{norm}.linear",)
            yield f"{old}.{side}_mlp.fc1", (f"{new}.{feed}.net.0.proj",)
            yield f"{old}.{side}_mlp.fc2", (f"{new}.{feed}.net.2",)
    for index in range(len(model.single_transformer_blocks)):
        old, new = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        yield f"{old}.linear1", tuple(f"{new}.{name}" for name in parts)
        yield f"{old}.linear2", (f"{new}.proj_out",)
        yield f"{old}.modulation.linear", (f"{new}.norm.linear",)
    for index in range(len(model.context_embedder.token_refiner.refiner_blocks)):
        old = f"txt_in.individual_token_refiner.blocks.{index}"
        new = f"context_embedder.token_refiner.refiner_blocks.{index}"
        attention = tuple(f"{new}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
        yield f"{old}.self_attn_qkv", attention
        yield f"{old}.self_attn_proj", (f"{new}.attn.to_out.0",)
        yield f"{old}.mlp.fc1", (f"{new}.ff.net.0.proj",)
        yield f"{old}.mlp.fc2", (f"{new}.ff.net.2",)


def _original_unet(model: UNetMotionModel, layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Stability's names of Stable Diffusion 1.5's layers, which some trainers kept."""
    sides = {
        "down_blocks": _number(model.down_blocks, "input_blocks", first=1),
        "up_blocks": _number(model.up_blocks, "output_blocks", first=0),
    }
    for layer in layers:
        if layer in OUTSIDE:
            yield OUTSIDE[layer], layer
        elif match := IN_MIDDLE.fullmatch(layer):
            part, rest = match.groups()
            yield f"middle_block.{MIDDLE[part]}.{IN_RESNET.get(rest, rest)}", layer
        elif match := IN_BLOCK.fullmatch(layer):
            side, number, kind, index, rest = match.groups()
            yield sides[side][int(number)].name_of(kind, int(index), rest), layer


@dataclass(frozen=True, slots=True)
class _Block:
    """One of diffusers' blocks, whose parts originally were blocks by themselves: name.first on."""

    name: str
    first: int
    num_resnets: int
    has_attention: bool

    def name_of(self, kind: str, index: int, rest: str) -> str:
        match kind:
            case "resnets":
                return f"{self.name}.{self.first + index}.0.{IN_RESNET.get(rest, rest)}"
            case "attentions":
                return f"{self.name}.{self.first + index}.1.{rest}"
            case "downsamplers":
                return f"{self.name}.{self.first + self.num_resnets}.0.op"
            case _:  # with the last of the block
                place = 2 if self.has_attention else 1
                return f"{self.name}.{self.first + self.num_resnets - 1}.{place}.conv"


def _number(blocks: Iterable[Any], name: str, first: int) -> list[_Block]:
    found = []
    for block in blocks:
        num_resnets = len(block.resnets)
        found.append(_Block(name, first, num_resnets, hasattr(block, "attentions")))
        first += num_resnets + (getattr(block, "downsamplers", None) is not None)
    return found
