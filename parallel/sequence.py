"""Sequence parallelism for full attention: each rank holds a run of the tokens.

Inside a node each rank attends with some of the heads over all tokens (Ulysses,
arXiv:2309.14509); across nodes keys and values go round a ring (arXiv:2310.01889). Both together
are Ulysses inside and the ring across (USP, arXiv:2405.07719). There are no masks: the caller
trims its text to what is valid; who may see whom else is said by a `Restriction`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.process_group import ProcessGroup, alone
from parallel.restriction import Restriction
from parallel.shard import Shard, split_sizes


class SequenceSharding:
    """Who shares the tokens now: the one thing that sharded attention reads at each call.

    everyone: all ranks of the sequence, ring * ulysses of them; the rank's number in it is its
    number in the ring times the size of the Ulysses group plus its number there. restriction: who
    sees whom, for the caller to set and its layers to read. tokens: how the image's are split now.
    """

    def __init__(self) -> None:
        self.restriction: Restriction | None = None
        self.tokens = Shard((1,), 0)
        self.use(alone(), alone(), alone())

    def use(self, everyone: ProcessGroup, ulysses: ProcessGroup, ring: ProcessGroup) -> None:
        """Share sequences over these groups from now on; ValueError if they do not fit."""
        if everyone.size != ulysses.size * ring.size:
            raise ValueError(f"{everyone.size} ranks are not {ulysses.size} times {ring.size}")
        self.everyone, self.ulysses, self.ring = everyone, ulysses, ring

    def shard(self, length: int) -> Shard:
        """The part of that many tokens that is this rank's."""
        return Shard(split_sizes(length, self.everyone.size), self.everyone.rank)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        restriction: Restriction | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens over every rank's; all are [B, N, H, D].

        lengths: the tokens of each rank of everyone. ValueError if ranks outnumber heads.
        """
        ulysses, ring = self.ulysses, self.ring
        heads = split_sizes(query.shape[2], ulysses.size)
        if 0 in heads:
            raise ValueError(f"{query.shape[2]} heads cannot be shared by {ulysses.size} ranks")
        start = ring.rank * ulysses.size
        inside = lengths[start : start + ulysses.size]
        batch, width = query.shape[0], query.shape[3]
        own_heads = heads[ulysses.rank]
        # [B, N, H, D] -> of each rank [N, B, 3, H/U, D]: tokens first, so that what comes in is
        # one sequence as it stands
        by_heads = (torch.split(x, list(heads), dim=2) for x in (query, key, value))
        received = ulysses.all_to_all_rows(
            [
                torch.stack([x.transpose(0, 1) for x in of_rank], dim=2)
                for of_rank in zip(*by_heads, strict=True)
            ],
            inside,
            (batch, 3, own_heads, width),
        )
        # [N, B, 3, H/U, D] -> 3 of [B, H/U, N, D]
        query, key, value = received.permute(2, 1, 3, 0, 4).unbind(0)
        across = [
            sum(lengths[first : first + ulysses.size])
            for first in range(0, len(lengths), ulysses.size)
        ]
        # [B, H/U, N, D] -> [B, N, H/U, D]
        attended = _attend_round_ring(ring, query, key, value, across, restriction)
        attended = attended.transpose(1, 2)
        parts = ulysses.all_to_all(
            torch.split(attended, inside, dim=1),
            [(batch, inside[ulysses.rank], count, width) for count in heads],
        )
        return torch.cat(parts, dim=2)


def _attend_round_ring(
    ring: ProcessGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    restriction: Restriction | None,
) -> Tensor:
    """[B, H, N, D] each; lengths: the keys of each rank of the ring."""
    if ring.size == 1:
        if restriction is None:
            return F.scaled_dot_product_attention(query, key, value)
        return restriction.attend(_attend_with_normaliser, query, key, value)[0]
    starts = [sum(lengths[:rank]) for rank in range(ring.size)]
    held = torch.stack([key, value])
    parts, normalisers = [], []
    for turn in range(ring.size):
        last = turn == ring.size - 1
        if not last:
            # what arrives now was held, `turn + 1` ranks back, at the start
            origin = (ring.rank - turn - 1) % ring.size
            shape = (*held.shape[:3], lengths[origin], held.shape[4])
            arriving = ring.pass_on(held, shape)
        if restriction is None:
            part, normaliser = _attend_with_normaliser(query, held[0], held[1])
        else:
            part, normaliser = restriction.attend(
                _attend_with_normaliser,
                query,
                held[0],
                held[1],
                query_start=starts[ring.rank],
                key_start=starts[(ring.rank - turn) % ring.size],
            )
        precision = torch.promote_types(part.dtype, torch.float32)
        parts.append(part.to(precision))
        normalisers.append(normaliser.to(precision))
        if not last:
            held = arriving()
    # all at once: merged one by one, rounding would grow with the ring
    weights = torch.softmax(torch.stack(normalisers), dim=0)[..., None]
    return (torch.stack(parts) * weights).sum(0).to(query.dtype)


def _attend_with_normaliser(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each query's softmax sum, [B, H, N].

    The kernels under `scaled_dot_product_attention`, which keeps that sum to itself.
    """
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, normaliser = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, normaliser = aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    else:
        out, normaliser = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True
        )[:2]
        normaliser = normaliser[..., : query.shape[2]]  # the kernel pads it
    return out, normaliser
