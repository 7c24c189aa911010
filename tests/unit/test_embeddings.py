"""What was encoded before is not encoded again, and never another's."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.catalog import load_model
from models.embeddings import Arrays, EmbeddingCache
from models.spec import Use
from models.stages import load_encoder
from training.random_families import RANDOM_FAMILIES

KILO = np.zeros(250, np.float32)  # a thousand bytes


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return buffer.getvalue()


def arrays_of(conditioning: Any) -> list[NDArray[np.float32]]:
    """All arrays in it, in order."""
    found = []
    for name in type(conditioning).__dataclass_fields__:
        value = getattr(conditioning, name)
        if isinstance(value, np.ndarray):
            found.append(value)
        elif hasattr(value, "__dataclass_fields__"):
            found += arrays_of(value)
    return found


def fill(cache: EmbeddingCache, *keys: str) -> int:
    """How many of these were not there."""
    embeddings = cache.open("m")
    for key in keys:
        embeddings.get(key, lambda: (KILO,))
    return embeddings.num_made


def test_what_was_used_longest_ago_makes_room() -> None:
    cache = EmbeddingCache(3000)
    assert fill(cache, "a", "b", "c") == 3
    assert fill(cache, "a") == 0
    assert fill(cache, "d") == 1
    assert fill(cache, "c", "a", "d") == 0
    assert fill(cache, "b") == 1
    assert cache.size_bytes == 3000


@pytest.mark.parametrize("max_bytes", [0, 999])
def test_what_is_too_large_is_not_kept_and_makes_no_room(max_bytes: int) -> None:
    cache = EmbeddingCache(max_bytes)
    assert fill(cache, "a", "a") == 2
    assert cache.size_bytes == 0


def test_models_do_not_share() -> None:
    cache = EmbeddingCache(10_000)

    def get(model: str, value: Arrays) -> Arrays:
        return cache.open(model).get("key", lambda: value)

    first, other = (KILO,), (KILO + 1,)
    assert get("one", first) is first
    assert get("two", other) is other
    assert get("one", other) is first


@pytest.mark.parametrize("family", ["z-image-video", *RANDOM_FAMILIES])
def test_a_family_encodes_again_only_what_is_new(
    checkpoint: Path, random_family: Callable[[str], Path], family: str
) -> None:
    model = load_model(checkpoint if family == "z-image-video" else random_family(family))
    encoder, cache = load_encoder(model), EmbeddingCache(100_000_000)
    from_image = model.spec.start_image is Use.REQUIRED
    has_words = not family.startswith("svd")

    def encode(color: str = "red", **fields: Any) -> tuple[list[NDArray[np.float32]], int]:
        request = model.resolve({"prompt": "a box", "seed": 3, **fields})
        embeddings = cache.open(model.id)
        image = png(color) if from_image else None
        conditioning = encoder.encode(request, image, None, embeddings)
        return arrays_of(conditioning), embeddings.num_made

    first, num_made = encode()
    assert num_made > 0
    again, num_made = encode(seed=3 if family.startswith("svd") else 4)
    # SVD's latents have noise of the request's own in them
    assert num_made == (1 if family.startswith("svd") else 0)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    if has_words:
        assert encode(prompt="a circle")[1] == 1
    if from_image:
        assert encode(color="blue")[1] > 0
