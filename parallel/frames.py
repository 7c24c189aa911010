"""Frame parallelism: each rank holds a run of frames, exactly as if it held them all.

What mixes frames is replaced or wrapped, all else runs on the rank's own frames: attention over
time sees all frames of a part of space (DSP, arXiv:2403.10266), temporal convolutions borrow one
frame from each neighbour, group norms over time share their statistics.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.process_group import ProcessGroup, alone
from parallel.shard import Shard, split_sizes


class FrameSharding:
    """Who shares the frames now: the one thing that the modules below read at each call.

    It may change between two steps; with a group of one they do what the stock modules do.
    """

    def __init__(self) -> None:
        self.group = alone()
        self.frames = Shard((1,), 0)

    def use(self, group: ProcessGroup, num_frames: int) -> Shard:
        """Share num_frames over the group from now on; ValueError if a rank would have none."""
        if num_frames < group.size:
            raise ValueError(f"{num_frames} frames cannot be shared by {group.size} ranks")
        self.group = group
        self.frames = Shard(split_sizes(num_frames, group.size), group.rank)
        return self.frames

    def to_space(self, hidden: Tensor, *, frame_dim: int, space_dim: int) -> Tensor:
        """From this rank's frames of all of space to all frames of this rank's part of space."""
        space = Shard(split_sizes(hidden.shape[space_dim], self.group.size), self.group.rank)
        shapes = [
            _resized(hidden, {frame_dim: size, space_dim: space.size}) for size in self.frames.sizes
        ]
        received = self.group.all_to_all(torch.split(hidden, list(space.sizes), space_dim), shapes)
        return torch.cat(received, frame_dim)

    def to_frames(self, hidden: Tensor, *, frame_dim: int, space_dim: int, space: int) -> Tensor:
        """The inverse; space: the length of all of space."""
        sizes = split_sizes(space, self.group.size)
        shapes = [_resized(hidden, {frame_dim: self.frames.size, space_dim: s}) for s in sizes]
        received = self.group.all_to_all(
            torch.split(hidden, list(self.frames.sizes), frame_dim), shapes
        )
        return torch.cat(received, space_dim)


class FrameGroupNorm(nn.GroupNorm):
    """A group norm over [B, C, F, H, W] whose statistics are those of every rank's frames.

    Means and variances are joined by Chan's formula in at least float32, weighted by frames. It
    shares the parameters of the norm that it replaces, under the same names.
    """

    def __init__(self, norm: nn.GroupNorm, sharding: FrameSharding) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.sharding = sharding

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, F, H, W], F this rank's frames."""
        group, frames = self.sharding.group, self.sharding.frames
        if group.size == 1:
            return super().forward(hidden)
        precision = torch.promote_types(hidden.dtype, torch.float32)
        grouped = hidden.to(precision).reshape(len(hidden), self.num_groups, -1)
        # On a CPU `torch.var_mean` takes several times as long as these passes.
        mean = grouped.mean(dim=2)
        variance = (grouped - mean[..., None]).square_().mean(dim=2)
        # [R, 2, B, G]
        gathered = group.all_gather(torch.stack([mean, variance])[None], [1] * group.size, 0)
        shares = torch.tensor(frames.sizes, dtype=precision, device=hidden.device) / frames.length
        shares = shares[:, None, None]
        means, variances = gathered[:, 0], gathered[:, 1]
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean) ** 2)).sum(0)
        # One pass over the activations, in the form that torch's own kernel rounds in: [B, C].
        per_group = self.num_channels // self.num_groups
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(per_group, dim=1) * self.weight
        shift = self.bias - mean.repeat_interleave(per_group, dim=1) * scale
        by_channel = grouped.view(hidden.shape)
        normalised = torch.addcmul(
            shift[..., None, None, None], by_channel, scale[..., None, None, None]
        )
        return normalised.to(hidden.dtype)


class FrameHaloConv3d(nn.Conv3d):
    """A (3, 1, 1) convolution that borrows the neighbours' edge frames; zeros at the clip's ends.

    It shares the parameters of the convolution that it replaces, under the same names.
    """

    def __init__(self, conv: nn.Conv3d, sharding: FrameSharding) -> None:
        if conv.kernel_size != (3, 1, 1) or conv.padding != (1, 0, 0) or conv.stride != (1, 1, 1):
            raise ValueError(f"no halo of one frame serves {conv}")
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, padding=(1, 0, 0), device="meta"
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.sharding = sharding

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, F, H, W], F this rank's frames."""
        if self.sharding.group.size == 1:
            return super().forward(hidden)
        first, last = hidden[:, :, :1], hidden[:, :, -1:]
        before, after = self.sharding.group.exchange_edges(first, last)
        zeros = torch.zeros_like(first)
        padded = torch.cat(
            [zeros if before is None else before, hidden, zeros if after is None else after], dim=2
        )
        return F.conv3d(padded, self.weight, self.bias)


class FrameOffset(nn.Module):
    """Counts frames from the clip's first one, not from this rank's: before a time embedding."""

    def __init__(self, embed: nn.Module, sharding: FrameSharding) -> None:
        super().__init__()
        self.embed = embed
        self.sharding = sharding

    def forward(self, frame_numbers: Tensor) -> Any:
        """Frame numbers from 0, of any shape."""
        return self.embed(frame_numbers + self.sharding.frames.offset)


def _resized(tensor: Tensor, lengths: dict[int, int]) -> list[int]:
    shape = list(tensor.shape)
    for dim, length in lengths.items():
        shape[dim] = length
    return shape
