"""A lack of memory is one request's failure, not the process's."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class OutOfMemory(Exception):
    """A stage needs more memory than there is; only its request fails."""

    def __init__(self, model: str, detail: str) -> None:
        super().__init__(model, detail)
        self.model, self.detail = model, detail

    def __str__(self) -> str:
        return f"{self.model}: a request does not fit into memory: {self.detail}"


def within_memory(model: str, act: Callable[[], T]) -> T:
    """What act returns; OutOfMemory, with all that act had taken free again."""
    import torch

    try:
        return act()
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a bare RuntimeError.
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        detail = str(error).splitlines()[0]
    # Only here are the frames of what failed, and with them its tensors, gone.
    torch.cuda.empty_cache()
    raise OutOfMemory(model, detail)
