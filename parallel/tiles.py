"""Independent pieces of work, shared by ranks and put together on the first of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.process_group import ProcessGroup


def decode_shared(
    group: ProcessGroup,
    tiles: Sequence[Tensor],
    decode: Callable[[Tensor], Tensor],
    shape: Callable[[Tensor], tuple[int, ...]],
) -> list[Tensor] | None:
    """decode(tile) for every tile: tile i on rank i mod R, all of them returned on rank 0.

    shape: of what decode makes of a tile. None on the other ranks. All ranks hold all tiles.
    """
    own = [decode(tile) for tile in tiles[group.rank :: group.size]]
    if group.size == 1:
        return own
    sizes = [
        sum(torch.Size(shape(tile)).numel() for tile in tiles[rank :: group.size])
        for rank in range(group.size)
    ]
    nothing = tiles[0].new_empty(0)
    sent = torch.cat([decoded.reshape(-1) for decoded in own]) if own else nothing
    parts = [sent] + [nothing] * (group.size - 1)
    arriving = [(size if group.rank == 0 else 0,) for size in sizes]
    received = group.all_to_all(parts, arriving)
    if group.rank != 0:
        return None
    decoded: list[Tensor] = [nothing] * len(tiles)
    for rank, run in enumerate(received):
        shapes = [shape(tile) for tile in tiles[rank :: group.size]]
        pieces = torch.split(run, [torch.Size(s).numel() for s in shapes])
        decoded[rank :: group.size] = [p.view(s) for p, s in zip(pieces, shapes, strict=True)]
    return decoded
