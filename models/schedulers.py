"""diffusers' schedulers: the checkpoint's own, or another one made from its configuration."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor

from models.request import Scheduler, VideoRequest
from models.spec import SCHEDULER_CLASSES, WeightsDamaged, read_json
from models.tensors import DenoiseState

CLASSES = {
    Scheduler.DDIM: DDIMScheduler,
    Scheduler.EULER: EulerDiscreteScheduler,
    Scheduler.LCM: LCMScheduler,
}


class DiffusionSchedules:
    """Schedules of noise prediction (and velocity prediction), one for each request and step.

    A step needs nothing of the step before but the latents and the generator, so that a schedule is
    made anew each time. WeightsDamaged if the checkpoint's is none of these.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        self.config = read_json(path)
        name = self.config.get("_class_name")
        if name not in SCHEDULER_CLASSES:
            known = ", ".join(SCHEDULER_CLASSES)
            raise WeightsDamaged(str(path), f"its scheduler is {name}, not one of {known}")
        self.own = SCHEDULER_CLASSES[name]
        self.made: dict[Scheduler, Any] = {}

    def schedule(self, request: VideoRequest, device: torch.device) -> Any:
        """Its `timesteps`, `sigmas` and `init_noise_sigma` are the request's."""
        kind = request.scheduler or self.own
        if kind not in self.made:
            self.made[kind] = CLASSES[kind].from_config(self.config)
        schedule = copy.deepcopy(self.made[kind])
        schedule.set_timesteps(request.num_steps, device=device)
        return schedule


def begin_at(schedule: Any, step: int) -> Tensor:
    """Let the schedule go on from a step; that step's time."""
    if hasattr(schedule, "set_begin_index"):  # DDIM counts no steps
        schedule.set_begin_index(step)
    timestep: Tensor = schedule.timesteps[step]
    return timestep


def advance(
    schedule: Any, predicted: Tensor, timestep: Tensor, latents: Tensor, state: DenoiseState
) -> DenoiseState:
    """The state after a step; latents: those of the state, in the predicted one's layout.

    What a scheduler draws comes from the request's own generator.
    """
    generator = torch.Generator("cpu")
    generator.set_state(state.generator)
    stepped = schedule.step(predicted, timestep, latents, generator=generator).prev_sample
    return replace(state, latents=stepped, step=state.step + 1, generator=generator.get_state())
