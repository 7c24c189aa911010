"""How long a denoise step takes: as measured, or as predicted and corrected by what was measured.

Pure: the denoiser and the cluster simulator run the same.
"""

import statistics
from collections import defaultdict, deque

from parallel.plan import StepShape

REMEMBERED = 15


class StepTimes:
    """The recent steps of one group, by model, shape and degree."""

    def __init__(self) -> None:
        self.measured: dict[tuple[str, StepShape, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )
        self.ratios: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def observe(
        self, model: str, shape: StepShape, degree: int, *, predicted_s: float, took_s: float
    ) -> None:
        """Remember a step that was made."""
        self.measured[model, shape, degree].append(took_s)
        self.ratios[model].append(took_s / predicted_s)

    def expect(self, model: str, shape: StepShape, degree: int, *, predicted_s: float) -> float:
        """Seconds of the next step: the median of its like, else the corrected prediction."""
        measured = self.median(model, shape, degree)
        if measured is not None:
            return measured
        ratios = self.ratios.get(model)
        return predicted_s * (statistics.median(ratios) if ratios else 1.0)

    def median(self, model: str, shape: StepShape, degree: int) -> float | None:
        """Of the recent steps of that shape and degree; None if there were none."""
        measured = self.measured.get((model, shape, degree))
        return statistics.median(measured) if measured else None

    def known(self, model: str, shape: StepShape, degree: int) -> int:
        """How many of those are remembered."""
        return len(self.measured.get((model, shape, degree), ()))
