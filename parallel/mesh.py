"""The process groups of a plan: made when a plan is first used, then kept."""

from dataclasses import dataclass

import torch.distributed as dist

from parallel.plan import ParallelPlan
from parallel.process_group import ProcessGroup
from parallel.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Mesh:
    """The groups that this rank works in while a plan holds.

    guidance: the ranks that hold the same part for the other texts; part: those that share this
    branch's frames or tokens; ulysses and ring: how the latter do it, if tokens are shared.
    """

    guidance: ProcessGroup
    part: ProcessGroup
    ulysses: ProcessGroup
    ring: ProcessGroup

    @property
    def degree(self) -> int:
        """Ranks in all."""
        return self.guidance.size * self.part.size


class MeshBuilder:
    """Builds the meshes of one rank. All ranks make one, at the same time.

    torch names a group by how many there were before it. So all are made at once, on all ranks, in
    one order: of two ranks that had made others meanwhile, neither would find the other.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.traffic = Traffic()
        self.groups: dict[tuple[int, ...], ProcessGroup] = {
            (rank,): ProcessGroup((rank,), rank, None, self.traffic)
        }
        for ranks in aligned_groups(num_ranks):
            handle = dist.new_group(list(ranks))
            if rank in ranks:
                self.groups[ranks] = ProcessGroup(ranks, rank, handle, self.traffic)

    def mesh(self, plan: ParallelPlan, ranks: tuple[int, ...]) -> Mesh:
        """The groups of a plan over these ranks, a block of neighbours with this one among them.

        Ranks are numbered by node, so that a Ulysses group is a run of neighbours: position is
        (guidance * ring + place in the ring) * ulysses + place in Ulysses.
        """
        if len(ranks) != plan.degree:
            raise ValueError(f"{plan} needs {plan.degree} ranks, not {len(ranks)}")
        size = plan.degree // plan.guidance  # of a branch
        branch, place = divmod(ranks.index(self.rank), size)
        part = ranks[branch * size : (branch + 1) * size]
        turn, seat = divmod(place, plan.ulysses)
        return Mesh(
            guidance=self._group(ranks[place::size]),
            part=self._group(part),
            ulysses=self._group(part[turn * plan.ulysses : (turn + 1) * plan.ulysses]),
            ring=self._group(part[seat :: plan.ulysses] if plan.frames == 1 else (self.rank,)),
        )

    def _group(self, ranks: tuple[int, ...]) -> ProcessGroup:
        if ranks not in self.groups:
            raise ValueError(f"ranks {ranks} are no part of an aligned block")
        return self.groups[ranks]


def aligned_groups(num_ranks: int) -> list[tuple[int, ...]]:
    """Every set of ranks that a plan on an aligned block may need, in one order.

    A block is `size` neighbours from a multiple of size on; a set is every stride-th of a block.
    """
    groups = {
        tuple(range(first + offset, first + size, stride))
        for size in range(2, num_ranks + 1)
        for first in range(0, num_ranks - size + 1, size)
        for stride in range(1, size)
        if size % stride == 0
        for offset in range(stride)
    }
    return sorted(groups)
