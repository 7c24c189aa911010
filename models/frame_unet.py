"""A factorised UNet at work: its texts and its frames shared by the ranks of a mesh."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.catalog import Model
from models.cost import UNET_PARAMETERS, denoise_shape
from models.pausing import let_pause
from models.request import VideoRequest
from models.unet_sharding import shard_frames
from parallel.frames import FrameSharding
from parallel.guidance import predict_each
from parallel.mesh import Mesh, MeshBuilder
from parallel.plan import FrameShape, ParallelPlan

Text = TypeVar("Text")


class FrameUnet:
    """diffusers' `UNetMotionModel` or `UNetSpatioTemporalConditionModel`."""

    def __init__(self, unet: Any, beside: Sequence[FrameSharding] = ()) -> None:
        """beside: of other networks, which are to have the same frames."""
        self.unet = unet
        self.sharding = shard_frames(unet)
        self.beside = beside
        blocks = [
            layer
            for part in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
            for kind in ("resnets", "attentions", "motion_modules")
            for layer in getattr(part, kind, None) or []
        ]
        self.num_blocks = len(blocks)
        let_pause(blocks)
        self.use(MeshBuilder(0, 1).mesh(ParallelPlan(), (0,)))

    def use(self, mesh: Mesh) -> None:
        """Share every prediction from now on with the mesh's other ranks."""
        self.mesh = mesh

    def predict(
        self,
        texts: Sequence[Text],
        num_frames: int,
        call: Callable[[Sequence[Text], slice], Tensor],
        *,
        frame_dim: int,
    ) -> list[Tensor]:
        """One prediction for each text, of all frames, on every rank.

        call: predicts with these texts, as one batch, the frames of this slice.
        """
        frames = self.sharding.use(self.mesh.part, num_frames)
        for sharding in self.beside:
            sharding.use(self.mesh.part, num_frames)
        here = slice(frames.offset, frames.offset + frames.size)
        if self.mesh.guidance.size == 1:
            predicted = call(texts, here)
        else:
            each = predict_each(self.mesh.guidance, texts, lambda text: call([text], here))
            predicted = torch.cat(each)
        if self.mesh.part.size > 1:
            predicted = self.mesh.part.all_gather(predicted, frames.sizes, frame_dim)
        return list(predicted.split(1))

    def shape(
        self, model: Model, request: VideoRequest, num_texts: int, own_parameters: int = 0
    ) -> FrameShape:
        """What a step costs: that of the published UNet, by this one's parameters and those of
        what works beside it.
        """
        scale = model.spec.latent_scale
        width, height = model.spec.generated_size(request.width, request.height)
        # as many latents as the published model's VAE would make
        shape = denoise_shape(
            request.family,
            request.num_frames,
            8 * width // scale,
            8 * height // scale,
            guided=num_texts == 2,
        )
        assert isinstance(shape, FrameShape)
        parameters = sum(weight.numel() for weight in self.unet.parameters()) + own_parameters
        share = parameters / UNET_PARAMETERS[request.family]
        bytes_share = share**0.5 * self.unet.dtype.itemsize / 2
        return replace(
            shape,
            flops=shape.flops * share,
            temporal_bytes=shape.temporal_bytes * bytes_share,
            halo_bytes=shape.halo_bytes * bytes_share,
        )
