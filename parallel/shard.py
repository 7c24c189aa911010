"""Which part of a split dimension a rank holds."""

from dataclasses import dataclass

from torch import Tensor


def split_sizes(length: int, num_parts: int) -> tuple[int, ...]:
    """Sizes that differ by one at most, the larger ones first: 25 over 4 -> 7, 6, 6, 6."""
    size, rest = divmod(length, num_parts)
    return (size + 1,) * rest + (size,) * (num_parts - rest)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's run of a dimension; sizes are those of all ranks, in order."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def length(self) -> int:
        """Of the whole dimension."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's run begins."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """Of this rank's run."""
        return self.sizes[self.rank]

    def cut(self, whole: Tensor, dim: int) -> Tensor:
        """Cut this rank's run out of what all ranks hold; ValueError if it is of another length."""
        if whole.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} is {whole.shape[dim]} long, not {self.length}")
        return whole.narrow(dim, self.offset, self.size)
