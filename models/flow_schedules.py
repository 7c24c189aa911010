"""The noise levels of flow matching for Z-Image, and the ways from one to the next."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

from models.request import Scheduler, VideoRequest


class FlowSchedules:
    """One of diffusers' schedules for each request and step: made anew, since it counts steps.

    Heun's method is Euler's with the mean of two predictions, and has no class of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.euler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler", local_files_only=True
        )

    def schedule(self, request: VideoRequest, device: torch.device) -> Any:
        """Its `timesteps` and `sigmas` are the request's, from the publishers' levels."""
        kind: Any = type(self.euler)
        if request.scheduler is Scheduler.LCM:
            kind = FlowMatchLCMScheduler
        schedule = kind.from_config(self.euler.config)
        if request.flow_shift is not None:
            schedule.set_shift(request.flow_shift)
        sigmas = get_default_z_image_sigmas(request.num_steps)
        schedule.set_timesteps(sigmas=sigmas, device=device)
        return schedule
