"""torch.distributed, counted: every byte that a rank sends goes through here."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.traffic import Traffic


class ProcessGroup:
    """Ranks that work on one tensor. A group of one sends nothing and gives back what it gets.

    ranks: their numbers in the world, this process's among them; handle: torch's group of them.
    """

    def __init__(
        self, ranks: tuple[int, ...], rank: int, handle: dist.ProcessGroup | None, traffic: Traffic
    ) -> None:
        self.ranks = ranks
        self.rank = ranks.index(rank)
        self.size = len(ranks)
        self.handle = handle
        self.traffic = traffic

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send parts[r] to rank r; what rank r sent here comes back at r, in shapes[r]."""
        if self.size == 1:
            return list(parts)
        received = self._exchange(parts, [_numel(shape) for shape in shapes])
        runs = torch.split(received, [_numel(shape) for shape in shapes])
        return [run.view(*shape) for run, shape in zip(runs, shapes, strict=True)]

    def all_to_all_rows(
        self, parts: Sequence[Tensor], lengths: Sequence[int], row: Sequence[int]
    ) -> Tensor:
        """As `all_to_all`, where what comes differs in its first length only: [sum, *row].

        Rank r sends lengths[r] rows of that shape. As they arrive they are one tensor: no copy.
        """
        if self.size == 1:
            return parts[0]
        received = self._exchange(parts, [length * _numel(row) for length in lengths])
        return received.view(sum(lengths), *row)

    def _exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Flat: counts[r] values from rank r, in the order of ranks."""
        self.traffic.add("all_to_all", [part for r, part in enumerate(parts) if r != self.rank])
        received = parts[0].new_empty(sum(counts))
        dist.all_to_all_single(
            received,
            torch.cat([part.reshape(-1) for part in parts]),
            list(counts),
            [part.numel() for part in parts],
            group=self.handle,
        )
        return received

    def all_gather(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Every rank's part, joined along dim; sizes says how long each of them is there.

        Over an all-to-all, since gloo's all-gather takes no uneven parts; the bytes are the same.
        """
        if self.size == 1:
            return part
        self.traffic.add("all_gather", [part] * (self.size - 1))
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        received = part.new_empty(sum(_numel(shape) for shape in shapes))
        dist.all_to_all_single(
            received,
            part.reshape(-1).repeat(self.size),
            [_numel(shape) for shape in shapes],
            [part.numel()] * self.size,
            group=self.handle,
        )
        runs = torch.split(received, [_numel(shape) for shape in shapes])
        return torch.cat([run.view(s) for run, s in zip(runs, shapes, strict=True)], dim)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's, on every rank; the others' own is lost."""
        if self.size == 1:
            return tensor
        if self.rank == 0:
            self.traffic.add("broadcast", [tensor] * (self.size - 1))
        dist.broadcast(tensor, src=self.ranks[0], group=self.handle)
        return tensor

    def exchange_edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The last edge of the rank before and the first edge of the rank after, if there are."""
        operations, sent = [], []
        before = after = None
        if self.rank > 0:
            before = torch.empty_like(last, memory_format=torch.contiguous_format)
            sent.append(first.contiguous())
            operations += [
                self._point(dist.isend, sent[-1], self.rank - 1),
                self._point(dist.irecv, before, self.rank - 1),
            ]
        if self.rank < self.size - 1:
            after = torch.empty_like(first, memory_format=torch.contiguous_format)
            sent.append(last.contiguous())
            operations += [
                self._point(dist.isend, sent[-1], self.rank + 1),
                self._point(dist.irecv, after, self.rank + 1),
            ]
        if operations:
            self.traffic.add("exchange_edges", sent)
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return before, after

    def pass_on(self, tensor: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to send to the next rank of the ring; the result waits for the previous one's."""
        sent = tensor.contiguous()
        received = sent.new_empty(*shape)
        self.traffic.add("pass_on", [sent])
        operations = [
            self._point(dist.isend, sent, (self.rank + 1) % self.size),
            self._point(dist.irecv, received, (self.rank - 1) % self.size),
        ]
        requests = dist.batch_isend_irecv(operations)

        def wait() -> Tensor:
            for request in requests:
                request.wait()
            operations.clear()  # until here they keep the sent tensor alive
            return received

        return wait

    def _point(self, operation: Callable[..., object], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, self.ranks[peer], self.handle)


def alone(rank: int = 0) -> ProcessGroup:
    """A group of this process only."""
    return ProcessGroup((rank,), rank, None, Traffic())


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
