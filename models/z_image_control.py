"""A control network beside Z-Image's transformer, and how its ranks share it.

Follows `diffusers.ZImageControlNetPipeline`, with a frame axis: its patches are the transformer's
own, so that for every temporal patch size each token is led by the frames that it is of.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from models.conditioning import FloatArray
from models.control import ControlNet
from models.transformer_sharding import MASKED, LocalSamples, ZImageProcessor, ZImageStretch
from models.weights import load_component
from parallel.process_group import alone
from parallel.sequence import SequenceSharding


class ZImageControl:
    """One control network, which works with the transformer's own embedders and refiners."""

    def __init__(
        self, net: ControlNet, transformer: ZImageTransformer2DModel, sharding: SequenceSharding
    ) -> None:
        device, self.dtype = transformer.device, transformer.dtype
        model = load_component(ZImageControlNetModel, net.folder, self.dtype, device)
        self.model = ZImageControlNetModel.from_transformer(model, transformer)
        self.own_parameters = sum(
            weight.numel() for weight in self.model.control_layers.parameters()
        )
        self.num_layers = len(self.model.control_layers)
        _share(self.model, transformer.config.n_layers - 1, sharding)

    def samples(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        texts: Sequence[Tensor],
        control: FloatArray,
        *,
        scale: float,
        f_patch_size: int,
        patch_size: int,
    ) -> dict[int, Tensor]:
        """What to add after which layer, of one request's texts; latents and control: [C, F, H, W].

        Networks that also take an image to fill in (V2) have their other channels at zero, as in
        diffusers and VideoX-Fun.
        """
        given = torch.tensor(control, dtype=self.dtype, device=times.device)
        spare = self.model.config.control_in_dim - len(given)
        given = torch.cat([given, given.new_zeros(spare, *given.shape[1:])])
        made: dict[int, Tensor] = self.model(
            list(latents),
            times,
            list(texts),
            [given] * len(latents),
            conditioning_scale=scale,
            patch_size=patch_size,
            f_patch_size=f_patch_size,
        )
        return made


def _share(net: ZImageControlNetModel, last_layer: int, sharding: SequenceSharding) -> None:
    """Have each rank make its tokens' part of the control layers.

    What comes before them, two of some seventeen layers, every rank makes whole: there the
    residuals of one layer are wanted whole and those of the next in parts.
    """
    shared = ControlStretch(net, sharding, last_layer)
    net.register_forward_pre_hook(shared.begin)
    for index, block in enumerate(net.control_layers):
        block.register_forward_pre_hook(partial(shared.enter, index))
        block.attention.set_processor(ZImageProcessor(shared.stretch, block.attention.processor))
    net.register_forward_hook(shared.leave)


class ControlStretch:
    """A call of the control network: alone up to its last run of control layers, then shared."""

    def __init__(
        self, net: ZImageControlNetModel, sharding: SequenceSharding, last_layer: int
    ) -> None:
        self.sharding = sharding
        self.stretch = ZImageStretch(sharding)
        self.last_layer = last_layer
        # Light ones refine with the control layers, too, before they run through them.
        self.num_runs = 2 if net.add_control_noise_refiner == "control_layers" else 1
        self.runs_left = 0
        self.groups = (sharding.everyone, sharding.ulysses, sharding.ring)

    def begin(self, _net: nn.Module, _args: tuple[Any, ...]) -> None:
        """Before the network."""
        self.groups = (self.sharding.everyone, self.sharding.ulysses, self.sharding.ring)
        self.sharding.use(alone(), alone(), alone())
        self.runs_left = self.num_runs

    def enter(self, index: int, _block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before each control layer: (control, hidden, mask, rotary embedding, ...); cut them.

        After the first, control is a stack of this rank's.
        """
        control, hidden, mask, rotary, *rest = args
        if index == 0:
            self.runs_left -= 1
            if self.runs_left == 0:
                self.sharding.use(*self.groups)
        if self.sharding.everyone.size == 1:
            return None
        if len(mask) > 1:
            raise ValueError(MASKED)
        if index == 0:
            self.stretch.tokens = self.sharding.shard(hidden.shape[1])
            control = self.stretch.tokens.cut(control, 1)
        cut = self.stretch.tokens.cut
        return (control, cut(hidden, 1), None, cut(rotary, 1), *rest)

    def leave(
        self, _net: nn.Module, _args: tuple[Any, ...], samples: dict[int, Tensor]
    ) -> dict[int, Tensor] | None:
        """After the network: after its last layer the transformer's tokens are whole again."""
        everyone = self.sharding.everyone
        if everyone.size == 1:
            return None
        local = LocalSamples(samples)
        if self.last_layer in local:
            sizes = self.stretch.tokens.sizes
            local[self.last_layer] = everyone.all_gather(local[self.last_layer], sizes, 1)
        return local
