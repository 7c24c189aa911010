"""What the stages of a video take on a tier: as measured, or as predicted and then corrected.

Pure; all that was measured is handed in.
"""

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoscaling.tiers import SPEED, GpuTier
from jobs.job import Phase
from jobs.stage_times import TimedStage
from models.catalog import Model
from models.cost import DECODE_S_PER_PIXEL, VideoShape
from parallel.plan import P4D, predict_step, quickest_plans


@dataclass(frozen=True, slots=True)
class TierGpus:
    """So many GPUs make the steps of a tier's replica; degrees: at which they may, None: any."""

    tier: GpuTier
    count: int = 1
    degrees: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StageCosts:
    """measured: seconds of stages, by model, shape, tier and degree."""

    models: Mapping[str, Model]
    measured: Mapping[TimedStage, float] = field(default_factory=dict)

    def serves(self, model: str) -> bool:
        """Whether there is such a model."""
        return model in self.models

    def step_s(self, model: str, shape: VideoShape, gpus: TierGpus) -> dict[int, float]:
        """Of one denoise step, by the number of ranks."""
        predicted = self._predicted(model, shape, gpus)
        ratio = self._ratio(model, gpus)
        return {
            degree: self.measured.get(
                TimedStage(model, str(shape), gpus.tier, Phase.DENOISE, degree), seconds * ratio
            )
            for degree, seconds in predicted.items()
        }

    def step_work_s(self, model: str, shape: VideoShape, gpus: TierGpus) -> float:
        """GPU-seconds of a step at the number of ranks that takes the least of them."""
        return min(degree * seconds for degree, seconds in self.step_s(model, shape, gpus).items())

    def decode_s(self, model: str, shape: VideoShape, tier: GpuTier) -> float:
        """Of one decoder."""
        stage = TimedStage(model, str(shape), tier, Phase.DECODE)
        pixels = shape.num_frames * shape.width * shape.height
        return self.measured.get(stage, pixels * DECODE_S_PER_PIXEL / SPEED.get(tier, 1.0))

    def _predicted(self, model: str, shape: VideoShape, gpus: TierGpus) -> dict[int, float]:
        entry = self.models[model]
        step = shape.step(entry.manifest.family, entry.spec)
        topology = replace(P4D, gpus_per_node=gpus.count)
        speed = SPEED.get(gpus.tier, 1.0)
        found = quickest_plans(step, gpus.count, topology, gpus.degrees)
        return {
            degree: predict_step(step, plan, topology).step_s / speed
            for degree, plan in found.items()
        }

    @functools.cached_property
    def _measured_steps(self) -> dict[tuple[str, str], list[tuple[TimedStage, float]]]:
        found: dict[tuple[str, str], list[tuple[TimedStage, float]]] = {}
        for stage, seconds in self.measured.items():
            if stage.stage is Phase.DENOISE and stage.model in self.models:
                found.setdefault((stage.model, stage.tier), []).append((stage, seconds))
        return found

    def _ratio(self, model: str, gpus: TierGpus) -> float:
        """By how much the model's steps on that tier are longer than predicted."""
        ratios = []
        for stage, seconds in self._measured_steps.get((model, gpus.tier), []):
            predicted = self._predicted(model, VideoShape.parse(stage.shape), gpus)
            if stage.degree in predicted:
                ratios.append(seconds / predicted[stage.degree])
        return statistics.median(ratios) if ratios else 1.0
