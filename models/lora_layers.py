"""LoRAs on a denoiser's layers: loaded once, mixed anew for every request, never merged.

So a request's LoRAs leave nothing behind: without them the layers compute what they always did, to
the bit. Keys are read in diffusers', the publishers' original and kohya's layout; where original
layers are several of diffusers' at once (HunyuanVideo), they are taken apart.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from models.lora import Lora, LoraDoesNotFit
from models.lora_names import names_of
from models.probe import is_of_text, strip_prefixes
from models.request import LoraUse

# The last groups of a key, and what they hold: the down- or the up-projection, or the scale.
ENDINGS = (
    (re.compile(r"\.lora_A(\.default)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), "up"),
    (re.compile(r"[._]lora(_linear_layer)?[._]down\.weight$"), "down"),
    (re.compile(r"[._]lora(_linear_layer)?[._]up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)


class Half(Enum):
    """Which of a file's layers are a network's: those of a text encoder may be with the others."""

    DENOISER = auto()
    TEXT = auto()
    # of a family whose text encoder takes none
    WHOLE = auto()


@dataclass
class Change:
    """Of one layer of the file: what it is multiplied by, [r, in] and [out, r], and its alpha."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


class LoraLayers:
    """The LoRAs of one network; a request says which are on, and how much of each."""

    def __init__(self, model: nn.Module, loras: Iterable[Lora], half: Half = Half.WHOLE) -> None:
        """LoraDoesNotFit."""
        self.model = model
        layers: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self.number = {lora.id: str(index) for index, lora in enumerate(loras)}
        self.changed_by: set[str] = set()
        for lora in loras:
            changes = read_changes(lora, model, layers, half)
            if changes:
                self._inject(self.number[lora.id], changes)
                self.changed_by.add(lora.id)
        self.tuned: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.use(())

    def _inject(self, adapter: str, changes: dict[str, tuple[Tensor, Tensor]]) -> None:
        ranks = {f"^{re.escape(name)}": down.shape[0] for name, (down, _) in changes.items()}
        # The scale is in the weights already: alpha is the rank everywhere.
        config = LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules="|".join(map(re.escape, changes)),
            rank_pattern=ranks,
            alpha_pattern=ranks,
        )
        with warnings.catch_warnings():
            # that there is another one already, which is what is meant
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            inject_adapter_in_model(config, self.model, adapter)
        state = {}
        for name, (down, up) in changes.items():
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
        report: Any = set_peft_model_state_dict(self.model, state, adapter)
        assert not report.unexpected_keys, report.unexpected_keys
        self.model.requires_grad_(False)

    def use(self, wanted: Sequence[LoraUse]) -> None:
        """Have these, and no others, in every pass from now on."""
        names = [self.number[use.name] for use in wanted]
        for layer in self.tuned:
            present = [name for name in names if name in layer.r]
            layer.enable_adapters(bool(present))
            if not present:
                continue
            layer.set_adapter(present, inference_mode=True)
            for use in wanted:
                if self.number[use.name] in present:
                    layer.set_scale(self.number[use.name], use.weight)


def read_changes(
    lora: Lora, model: nn.Module, layers: dict[str, nn.Module], half: Half
) -> dict[str, tuple[Tensor, Tensor]]:
    """Down- and up-projection of each layer of the model, scaled by alpha / rank; LoraDoesNotFit
    for keys of no layer, and for a file that has none at all.
    """
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for targets, change in _by_layers(lora, names_of(model, layers), half).items():
        if change.down is None or change.up is None:
            raise LoraDoesNotFit(str(lora.path), f"half of {targets[0]} is missing")
        scale = 1.0 if change.alpha is None else change.alpha / len(change.down)
        sizes = [_num_outputs(layers[name]) for name in targets]
        if len(change.up) != sum(sizes):
            told = f"{tuple(change.up.shape)} is not for {' and '.join(targets)} of {sizes} rows"
            raise LoraDoesNotFit(str(lora.path), told)
        # all share the down-projection, and have rows of the up-projection
        for name, up in zip(targets, change.up.split(sizes), strict=True):
            if name in changes:
                raise LoraDoesNotFit(str(lora.path), f"{name} is changed by two of its layers")
            _check_shape(lora, name, layers[name], change.down, up)
            changes[name] = (change.down, up.contiguous() * scale)
    return changes


def _by_layers(
    lora: Lora, names: dict[str, tuple[str, ...]], half: Half
) -> dict[tuple[str, ...], Change]:
    """What the half's keys say, by the layers that they are of."""
    found: dict[tuple[str, ...], Change] = {}
    unknown = []
    content = load_file(lora.path)
    for key, tensor in content.items():
        if is_of_text(key) is not (half is Half.TEXT):
            if half is Half.WHOLE:
                unknown.append(key)
            continue  # another network's
        module, part = _split(key)
        targets = names.get(module)
        if targets is None or part is None:
            unknown.append(key)
            continue
        change = found.setdefault(targets, Change())
        setattr(change, part, tensor.item() if part == "alpha" else tensor)
    if unknown or not content:
        named = ", ".join(sorted(unknown)[:3]) or "it has no layer at all"
        raise LoraDoesNotFit(str(lora.path), f"{len(unknown)} keys fit no layer: {named}")
    return found


def _split(key: str) -> tuple[str, str | None]:
    """The layer's name as the file has it, and what of it the key is; None: nothing known."""
    key = strip_prefixes(key)
    for ending, part in ENDINGS:
        if match := ending.search(key):
            # old MotionLoRAs were of attention processors
            return key[: match.start()].replace(".processor.", "."), part
    return key, None


def _num_outputs(layer: Any) -> int:
    size: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return size


def _check_shape(lora: Lora, name: str, layer: Any, down: Tensor, up: Tensor) -> None:
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if down.shape[1] != inputs or up.shape[0] != _num_outputs(layer) or up.shape[1] != len(down):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise LoraDoesNotFit(str(lora.path), f"{name} can't be changed by {shapes}")
