"""Blocks of neighbouring ranks, and which of a group's are free: sets of ranks as bits.

A block's first rank is a multiple of its size, as in a buddy allocator (Knowlton, CACM 8, 1965):
blocks never overlap in part, so that a free one is never cut in two for a smaller one's sake.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple


class Block(NamedTuple):
    """`size` neighbouring ranks from `first` on; first is a multiple of size."""

    first: int
    size: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(range(self.first, self.first + self.size))

    def overlaps(self, other: "Block") -> bool:
        """They have a rank in common."""
        return bool(bits_of(self) & bits_of(other))


@functools.cache
def bits_of(block: Block) -> int:
    """The set of its ranks."""
    return ((1 << block.size) - 1) << block.first


@functools.cache
def blocks_of(num_ranks: int, size: int) -> tuple[tuple[int, Block], ...]:
    """All blocks of a size, each behind the set of its ranks."""
    blocks = (Block(first, size) for first in range(0, num_ranks - size + 1, size))
    return tuple((bits_of(block), block) for block in blocks)


@functools.lru_cache(maxsize=1 << 16)
def best_fit(num_ranks: int, size: int, free: int) -> Block | None:
    """The free block that breaks up least of what is free around it."""
    fitting = [block for bits, block in blocks_of(num_ranks, size) if bits & free == bits]
    return min(
        fitting, key=lambda block: (_free_around(num_ranks, block, free), block), default=None
    )


def _free_around(num_ranks: int, block: Block, free: int) -> int:
    """The ranks of the largest free block around it."""
    size, largest = block.size, block.size
    while (size := size * 2) <= num_ranks:
        around = bits_of(Block(block.first - block.first % size, size))
        if around & free != around:
            break
        largest = size
    return largest


class RankBoard:
    """Which ranks are free at a moment, and when those will be that are at work.

    free: those that can be given away now; given: those that were, or are held for somebody.
    """

    def __init__(
        self, now_s: float, num_ranks: int, at_work: Iterable[tuple[Block, float]]
    ) -> None:
        """at_work: blocks, and when each of them is free again."""
        self.now_s = now_s
        self.num_ranks = num_ranks
        self.at_work = [
            (bits_of(block), max(ends_s, math.nextafter(now_s, math.inf)))
            for block, ends_s in at_work
        ]
        self.free, self.given = (1 << num_ranks) - 1, 0
        for bits, _ in self.at_work:
            self.free &= ~bits

    def take(self, block: Block) -> None:
        """Give its ranks away."""
        self._give(bits_of(block))

    def is_free(self, block: Block) -> bool:
        """All of its ranks are."""
        bits = bits_of(block)
        return bits & self.free == bits

    def is_free_but_for(self, block: Block, part: Block) -> bool:
        """Its ranks outside of the part exist and are free."""
        others = bits_of(block) & ~bits_of(part)
        return others & self.free == others

    def fit(self, size: int, before: Block | None, among: int | None = None) -> Block | None:
        """A free block, if possible the one before, else the best fit; None if there is none.

        among: the free ranks that count, if not all of them.
        """
        free = self.free if among is None else among
        if before is not None and before.size == size:
            bits = bits_of(before)
            if bits & free == bits:
                return before
        return best_fit(self.num_ranks, size, free)

    def hold_soonest(
        self, size: int, before: Block | None, closed: int = 0
    ) -> tuple[int, float] | None:
        """Give away the block that is free first; its ranks that are free now, and when all are.

        None if every block has a rank that was given away, or is closed to whom it is for.
        """
        best: tuple[float, bool, int] | None = None
        for bits, block in blocks_of(self.num_ranks, size):
            if bits & (self.given | closed):
                continue
            key = (self._free_from(bits), block != before, bits)
            if best is None or key < best:
                best = key
        if best is None:
            return None
        free_s, _, bits = best
        inside = bits & self.free
        self._give(bits)
        return inside, free_s

    def _give(self, bits: int) -> None:
        self.free &= ~bits
        self.given |= bits

    def _free_from(self, bits: int) -> float:
        return max((ends_s for busy, ends_s in self.at_work if busy & bits), default=self.now_s)
