"""Restricted attention is that of a mask of all pairs."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.restriction import Restriction, Sight
from parallel.sequence import _attend_with_normaliser

LENGTH = 23


def places(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def regions() -> Restriction:
    """Tokens 0..14 see each other; two texts, of which each sees its own of them and itself."""
    image = torch.arange(15)
    first, second = places(0, 1, 2, 3, 9), places(3, 4, 12, 13, 14)
    texts = torch.arange(15, 19), torch.arange(19, 23)
    sights = [Sight(image, image)]
    for seen, text in zip((first, second), texts, strict=True):
        sights += [Sight(seen, text), Sight(text, torch.cat([seen, text]))]
    return Restriction(sights)


def dense(restriction: Restriction) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for sight in restriction.sights:
        mask[sight.queries[:, None], sight.keys[None]] = True
    return mask


@pytest.fixture
def sequence() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, LENGTH, 8, generator=generator).unbind(0)
    return query, key, value


def test_it_is_attention_under_the_mask_of_all_pairs(
    sequence: tuple[Tensor, Tensor, Tensor],
) -> None:
    restriction = regions()
    expected = F.scaled_dot_product_attention(*sequence, attn_mask=dense(restriction))
    found, _ = restriction.attend(_attend_with_normaliser, *sequence)
    assert (found - expected).abs().max() < 1e-6
    free = F.scaled_dot_product_attention(*sequence)
    assert (found - free).abs().max() > 1e-2


@pytest.mark.parametrize("cuts", [(7,), (15, 19), (3, 4, 20)])
def test_parts_of_the_keys_merge_to_the_whole(
    sequence: tuple[Tensor, Tensor, Tensor], cuts: tuple[int, ...]
) -> None:
    restriction, (query, key, value) = regions(), sequence
    expected, _ = restriction.attend(_attend_with_normaliser, *sequence)
    bounds = [0, *cuts, LENGTH]
    for first, last in pairwise(bounds):
        parts = [
            restriction.attend(
                _attend_with_normaliser,
                query[:, :, first:last],
                key[:, :, start:end],
                value[:, :, start:end],
                query_start=first,
                key_start=start,
            )
            for start, end in pairwise(bounds)
        ]
        weights = torch.softmax(torch.stack([normaliser for _, normaliser in parts]), 0)
        merged = sum(
            weight[..., None] * part for weight, (part, _) in zip(weights, parts, strict=True)
        )
        assert (merged - expected[:, :, first:last]).abs().max() < 1e-6


def test_who_sees_no_key_has_no_weight(sequence: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = sequence
    blind = Restriction([Sight(places(0, 1), places(2))])
    attended, normaliser = blind.attend(_attend_with_normaliser, query, key, value)
    assert torch.equal(attended[:, :, 2:], torch.zeros_like(attended[:, :, 2:]))
    assert (normaliser[:, :, 2:] == -torch.inf).all()
    assert torch.allclose(attended[:, :, :2], value[:, :, 2:3].expand(-1, -1, 2, -1))
