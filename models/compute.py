"""How a tier's GPUs compute a model: in which numbers, with whose attention, from which weights."""

from enum import StrEnum

from pydantic import BaseModel


class Dtype(StrEnum):
    """The type of weights and activations; between steps latents are float32 whatever it is."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Attention(StrEnum):
    """Who computes attention: torch with whatever kernel it has, or only with fused ones (flash,
    and memory-efficient where there is a mask); or xformers, in UNets.
    """

    SDPA = "sdpa"
    FLASH = "flash"
    XFORMERS = "xformers"


class WeightStorage(StrEnum):
    """How a denoiser's weights lie in the GPU's memory: as they are computed with; as
    float8_e4m3fn, which rounds them; or block by block, fetched from the host's memory when they
    are needed.
    """

    WHOLE = "whole"
    FP8 = "fp8"
    OFFLOADED = "offloaded"


class ComputeUnavailable(Exception):
    """What the configuration asks for is not there, or does not work on this device."""

    def __init__(self, asked: str, reason: str) -> None:
        super().__init__(asked, reason)
        self.asked, self.reason = asked, reason

    def __str__(self) -> str:
        return f"{self.asked} is asked for and cannot be had: {self.reason}"


class FirstBlockOnly(Exception):
    """Ends a pass after its first block: what the model predicted before will do."""


class StepAbandoned(Exception):
    """Ends a step that has paused: the rest of it is not wanted."""


class Compute(BaseModel, frozen=True, extra="forbid"):
    """None: the best that the device has."""

    dtype: Dtype | None = None
    attention: Attention | None = None
    weights: WeightStorage = WeightStorage.WHOLE


THE_BEST = Compute()
