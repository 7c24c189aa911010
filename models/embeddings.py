"""What texts and images were encoded to, kept by their content for the requests that follow."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[np.float32], ...]


class EmbeddingCache:
    """At most so many bytes of arrays; what was used longest ago goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.kept: OrderedDict[Hashable, Arrays] = OrderedDict()
        self.lock = threading.Lock()

    def open(self, model_id: str) -> "Embeddings":
        """For one request of a model."""
        return Embeddings(self, model_id)

    def find(self, key: Hashable) -> Arrays | None:
        """What is kept, which is now the last to go."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: Hashable, arrays: Arrays) -> None:
        """Unless it alone is too large; others make room."""
        size_bytes = sum(array.nbytes for array in arrays)
        if size_bytes > self.max_bytes:
            return
        with self.lock:
            if key in self.kept:
                return  # another request has made it meanwhile
            self.kept[key] = arrays
            self.size_bytes += size_bytes
            while self.size_bytes > self.max_bytes:
                _, gone = self.kept.popitem(last=False)
                self.size_bytes -= sum(array.nbytes for array in gone)


class Embeddings:
    """One request's; num_made counts the passes of an encoder that it took."""

    def __init__(self, cache: EmbeddingCache, model_id: str) -> None:
        self.cache = cache
        self.model_id = model_id
        self.num_made = 0

    def get(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        """What is kept under the key, of this model, or what make returns; not to be changed."""
        found = self.cache.find((self.model_id, key))
        if found is None:
            found = make()
            self.note_pass()
            self.cache.keep((self.model_id, key), found)
        return found

    def note_pass(self) -> None:
        """An encoder's pass whose result is of no use to others."""
        self.num_made += 1


def digest(content: bytes | NDArray[Any]) -> bytes:
    """SHA-256, by which images are told apart."""
    data = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
    return hashlib.sha256(data).digest()


def no_embeddings() -> Embeddings:
    """For a request of which nothing is kept."""
    return EmbeddingCache(0).open("")
