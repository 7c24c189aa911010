"""Guidance parallelism: the texts of classifier-free guidance, each on ranks of its own."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from parallel.process_group import ProcessGroup
from parallel.shard import split_sizes

Text = TypeVar("Text")


def predict_each(
    group: ProcessGroup, texts: Sequence[Text], predict: Callable[[Text], Tensor]
) -> list[Tensor]:
    """predict(text) for every text, on every rank: this rank makes its share of them only.

    group: the ranks that hold the same part for other texts; all predictions have one shape. A
    single text is made by all of them. ValueError if there are several, but fewer than ranks.
    """
    if len(texts) == 1:
        return [predict(texts[0])]
    if len(texts) < group.size:
        raise ValueError(f"{len(texts)} texts cannot be shared by {group.size} ranks")
    sizes = split_sizes(len(texts), group.size)
    first = sum(sizes[: group.rank])
    own = [predict(text) for text in texts[first : first + sizes[group.rank]]]
    if group.size == 1:
        return own
    return list(group.all_gather(torch.stack(own), sizes, 0).unbind(0))
