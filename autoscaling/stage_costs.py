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
from models.request import ModelFamily
from models.spec import FamilySpec
from parallel.plan import P4D, predict_step, quickest_plans


@dataclass(frozen=True, slots=True)
class TierGpus:
    """So many GPUs make the steps of a tier's replica."""

    tier: GpuTier
    count: int = 1


@dataclass(frozen=True, slots=True)
class StageCosts:
    """measured: seconds of stages, by model, shape, tier and degree; ratios: of them to what was
    predicted, once asked for.
    """

    models: Mapping[str, Model]
    measured: Mapping[TimedStage, float] = field(default_factory=dict)
    ratios: dict[tuple[str, TierGpus], float] = field(default_factory=dict)

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
        return predict_steps(entry.manifest.family, entry.spec, shape, gpus)

    def _ratio(self, model: str, gpus: TierGpus) -> float:
        """By how much the model's steps on that tier are longer than predicted."""
        if (model, gpus) not in self.ratios:
            found = [
                seconds / predicted[stage.degree]
                for stage, seconds in self.measured.items()
                if (stage.model, stage.tier, stage.stage) == (model, gpus.tier, Phase.DENOISE)
                and stage.degree
                in (predicted := self._predicted(model, VideoShape.parse(stage.shape), gpus))
            ]
            self.ratios[model, gpus] = statistics.median(found) if found else 1.0
        return self.ratios[model, gpus]


@functools.lru_cache(maxsize=4096)
def predict_steps(
    family: ModelFamily, spec: FamilySpec, shape: VideoShape, gpus: TierGpus
) -> dict[int, float]:
    """Seconds of a step on a tier's GPUs, by the number of ranks."""
    step = shape.step(family, spec)
    topology = replace(P4D, gpus_per_node=gpus.count)
    speed = SPEED.get(gpus.tier, 1.0)
    found = quickest_plans(step, gpus.count, topology)
    return {
        degree: predict_step(step, plan, topology).step_s / speed for degree, plan in found.items()
    }
