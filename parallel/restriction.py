"""Attention of some tokens to some others only, exactly, and without a matrix of who sees whom.

A sequence of 100,000 tokens has no room for a mask of all pairs. But few kinds of tokens see
different things: each kind attends to each set of keys that it sees, and the parts are merged by
the sums of their softmaxes, as a ring's are (arXiv:2310.01889).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Attention, and the logarithm of each query's softmax sum: [B, H, N, D] and [B, H, N].
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Sight:
    """Queries that see keys, by their places in the sequence, int64 in rising order."""

    queries: Tensor
    keys: Tensor


class Restriction:
    """Who sees whom in a sequence: what any token sees by several sights is disjoint."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        self.sights = list(sights)

    def attend(
        self,
        kernel: Kernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_start: int = 0,
        key_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """What the kernel would answer if unseen keys were not there; [B, H, N, D] all.

        The tensors hold the sequence's tokens from query_start and key_start on. A query that sees
        none of these keys has zeros, and a sum of 0, whose logarithm is -inf.
        """
        precision = torch.promote_types(query.dtype, torch.float32)
        attended = query.new_zeros(query.shape, dtype=precision)
        normaliser = attended.new_full(query.shape[:3], -torch.inf)
        for sight in self.sights:
            rows = _within(sight.queries, query_start, query.shape[2])
            columns = _within(sight.keys, key_start, key.shape[2])
            if not len(rows) or not len(columns):
                continue
            part, part_normaliser = kernel(
                query[:, :, rows], key[:, :, columns], value[:, :, columns]
            )
            before, part_normaliser = normaliser[:, :, rows], part_normaliser.to(precision)
            after = torch.logaddexp(before, part_normaliser)
            kept, added = (
                (before - after).exp()[..., None],
                (part_normaliser - after).exp()[..., None],
            )
            attended[:, :, rows] = attended[:, :, rows] * kept + part.to(precision) * added
            normaliser[:, :, rows] = after
        return attended.to(query.dtype), normaliser


def _within(places: Tensor, start: int, length: int) -> Tensor:
    """Those of start .. start + length, counted from start."""
    return places[(places >= start) & (places < start + length)] - start
