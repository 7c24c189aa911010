"""ControlNets and SparseCtrl beside AnimateDiff's UNet: what they say is added to its levels.

Follow `diffusers.AnimateDiffControlNetPipeline` and `AnimateDiffSparseControlNetPipeline`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from numpy.typing import NDArray
from torch import Tensor

from models.catalog import Model
from models.conditioning import AnimateDiffConditioning, FloatArray
from models.control import ControlNet
from models.request import VideoRequest
from models.unet_sharding import shard_frames
from models.weights import load_component
from parallel.frames import FrameSharding

# Of the levels, from the finest one down, and of the middle.
Residuals = tuple[list[Tensor], Tensor]
FIRST_FRAME = (0,)


@dataclass(frozen=True, slots=True)
class Lead:
    """What one network is given: pictures [C, F, H, W] of these of the frames, None: of all."""

    net: ControlNet
    pictures: FloatArray
    frames: tuple[int, ...] | None
    scale: float


def nets_of(model: Model, request: VideoRequest) -> list[ControlNet]:
    """Those that a request makes use of."""
    nets = []
    if request.start_image is not None and model.start_control is not None:
        nets.append(model.start_control)
    if request.control is not None:
        nets.append(model.control_net(request.control.type))
    return nets


def leads_of(
    model: Model, request: VideoRequest, conditioning: AnimateDiffConditioning, step: int
) -> list[Lead]:
    """All that has a say in a step: the start image, and what the request is led by."""
    leads = []
    control, start, pictures = request.control, conditioning.start, conditioning.control
    if (request.start_image is None) != (start is None) or (control is None) != (pictures is None):
        raise ValueError("what is to lead the video is not in its conditioning")
    if start is not None and (net := model.start_control) is not None:
        leads.append(Lead(net, start, FIRST_FRAME, net.default_scale))
    if control is not None and pictures is not None and control.acts_in(step, request.num_steps):
        net = model.control_net(control.type)
        leads.append(Lead(net, pictures, control.frames, control.scale))
    return leads


class AnimateDiffControls:
    """All control networks of a model."""

    def __init__(
        self,
        nets: Sequence[ControlNet],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.models = {}
        self.shardings: list[FrameSharding] = []
        for net in nets:
            kind = SparseControlNetModel if net.is_sparse else ControlNetModel
            model = load_component(kind, net.folder, dtype, device)
            if net.is_sparse:
                self.shardings.append(shard_frames(model))
            self.models[net.id] = model

    def num_parameters(self, nets: Sequence[ControlNet]) -> int:
        """Of these networks."""
        return sum(w.numel() for net in nets for w in self.models[net.id].parameters())

    def residuals(
        self,
        leads: Sequence[Lead],
        noisy: Tensor,
        timestep: Tensor,
        states: Tensor,
        here: slice,
        num_frames: int,
    ) -> Residuals | None:
        """The sum of what the networks say of the frames that are `here`.

        noisy: [B, C, f, H, W], of those frames; states: [B * f, N, D].
        """
        found: Residuals | None = None
        for lead in leads:
            down, middle = self._ask(lead, noisy, timestep, states, here, num_frames)
            if found is not None:
                down = [one + other for one, other in zip(found[0], down, strict=True)]
                middle = found[1] + middle
            found = list(down), middle
        return found

    def _ask(
        self,
        lead: Lead,
        noisy: Tensor,
        timestep: Tensor,
        states: Tensor,
        here: slice,
        num_frames: int,
    ) -> Residuals:
        given = torch.tensor(lead.pictures, dtype=self.dtype, device=self.device)
        model = self.models[lead.net.id]
        if not lead.net.is_sparse:
            # [B, C, f, H, W] -> [B * f, C, H, W], and a picture for each
            flat = noisy.transpose(1, 2).flatten(0, 1)
            pictures = given[:, here].transpose(0, 1).repeat(len(noisy), 1, 1, 1)
            down, middle = model(
                flat,
                timestep,
                encoder_hidden_states=states,
                controlnet_cond=pictures,
                conditioning_scale=lead.scale,
                return_dict=False,
            )
            return list(down), middle
        channels, _, height, width = given.shape
        pictures = given.new_zeros(1, channels, num_frames, height, width)
        mask = given.new_zeros(1, 1, num_frames, height, width)
        known = list(range(num_frames) if lead.frames is None else lead.frames)
        pictures[0, :, known] = given[:, : len(known)]
        mask[:, :, known] = 1
        down, middle = model(
            noisy,
            timestep,
            encoder_hidden_states=states,
            controlnet_cond=pictures[:, :, here],
            conditioning_mask=mask[:, :, here],
            conditioning_scale=lead.scale,
            return_dict=False,
        )
        return list(down), middle


def as_pixels(padded: NDArray[np.uint8]) -> FloatArray:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in 0..1."""
    return np.ascontiguousarray(padded.transpose(3, 0, 1, 2), np.float32) / 255.0
