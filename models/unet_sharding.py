"""Shares the frames of diffusers' factorised UNets, and of SVD's decoder, between ranks.

Only what mixes frames is touched: temporal blocks by hooks, norms and convolutions over time by
modules that share their parameters. Parameter names stay as they are.
"""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from parallel.frames import FrameGroupNorm, FrameHaloConv3d, FrameOffset, FrameSharding

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def shard_frames(model: nn.Module) -> FrameSharding:
    """Prepare a `UNetMotionModel`, `UNetSpatioTemporalConditionModel` or `TemporalDecoder`.

    After `use` of what is returned, the model takes and gives this rank's frames only. ValueError
    if nothing in it mixes frames.
    """
    sharding = FrameSharding()
    num_found = 0
    for module in list(model.modules()):
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm = FrameGroupNorm(module.norm, sharding)
            _wrap(module.transformer_blocks, MotionLayout(sharding))
        elif isinstance(module, TransformerSpatioTemporalModel):
            module.time_proj = FrameOffset(module.time_proj, sharding)
            for block in module.temporal_transformer_blocks:
                _wrap([block], SpatioTemporalLayout(sharding))
        elif isinstance(module, TemporalResnetBlock):
            module.norm1 = FrameGroupNorm(module.norm1, sharding)
            module.norm2 = FrameGroupNorm(module.norm2, sharding)
            module.conv1 = FrameHaloConv3d(module.conv1, sharding)
            module.conv2 = FrameHaloConv3d(module.conv2, sharding)
        elif isinstance(module, TemporalDecoder):
            module.time_conv_out = FrameHaloConv3d(module.time_conv_out, sharding)
        else:
            continue
        num_found += 1
    if num_found == 0:
        raise ValueError(f"nothing in {type(model).__name__} mixes frames")
    return sharding


class MotionLayout:
    """Round AnimateDiff's motion blocks, whose rows are [B*H*W, F, C]."""

    def __init__(self, sharding: FrameSharding) -> None:
        self.sharding = sharding
        self.space = 0

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """[B*H*W, F/R, C] -> [B*H*W/R, F, C]"""
        hidden = kwargs["hidden_states"]
        self.space = hidden.shape[0]
        hidden = self.sharding.to_space(hidden, frame_dim=1, space_dim=0)
        return args, kwargs | {"hidden_states": hidden}

    def leave(self, hidden: Tensor) -> Tensor:
        """The inverse."""
        return self.sharding.to_frames(hidden, frame_dim=1, space_dim=0, space=self.space)


class SpatioTemporalLayout:
    """Round one of SVD's temporal blocks, whose rows are [B*F, H*W, C]."""

    def __init__(self, sharding: FrameSharding) -> None:
        self.sharding = sharding
        self.space = 0

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """[B*F/R, H*W, C] -> [B*F, H*W/R, C]; the context of time [B*H*W, L, D] likewise."""
        (hidden,) = args
        frames = self.sharding.frames
        self.space = hidden.shape[1]
        hidden = hidden.unflatten(0, (-1, frames.size))
        context = kwargs["encoder_hidden_states"].unflatten(0, (len(hidden), self.space))
        hidden = self.sharding.to_space(hidden, frame_dim=1, space_dim=2)
        # the context is the same at every place, so that any run of the right length will do
        context = context[:, : hidden.shape[2]].flatten(0, 1)
        changed = {"num_frames": frames.length, "encoder_hidden_states": context}
        return (hidden.flatten(0, 1),), kwargs | changed

    def leave(self, hidden: Tensor) -> Tensor:
        """The inverse."""
        hidden = hidden.unflatten(0, (-1, self.sharding.frames.length))
        hidden = self.sharding.to_frames(hidden, frame_dim=1, space_dim=2, space=self.space)
        return hidden.flatten(0, 1)


def _wrap(
    blocks: nn.ModuleList | list[nn.Module], layout: MotionLayout | SpatioTemporalLayout
) -> None:
    """Into the layout before the first block, out of it after the last, if there is sharing."""

    def enter(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        return layout.enter(args, kwargs) if layout.sharding.group.size > 1 else None

    def leave(_module: nn.Module, _args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        return layout.leave(hidden) if layout.sharding.group.size > 1 else None

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    blocks[-1].register_forward_hook(leave)
