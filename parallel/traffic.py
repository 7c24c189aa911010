"""What a rank has sent; torch-free, so that whoever adds it up needs no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """What this rank has sent: calls and bytes by collective, its own part left out."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)

    def add(self, collective: str, sent: "Sequence[Tensor]") -> None:
        """Count one call and the tensors that left this rank."""
        self.calls[collective] += 1
        self.bytes_sent[collective] += sum(tensor.nbytes for tensor in sent)

    def take(self) -> "Traffic":
        """What was counted until now; begin again at nothing."""
        taken = Traffic(self.calls.copy(), self.bytes_sent.copy())
        self.calls.clear()
        self.bytes_sent.clear()
        return taken
