"""Stable Video Diffusion: a start image set in motion, 14 (svd) or 25 (svd-xt) frames.

Follows `diffusers.StableVideoDiffusionPipeline` (Blattmann et al., arXiv:2311.15127): the image
comes in twice, as CLIP's embedding and as latents beside those of every frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    StableVideoDiffusionPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from models.attention import use_attention
from models.catalog import Model
from models.conditioning import FloatArray, SvdConditioning
from models.denoise import guide
from models.embeddings import Embeddings, digest, no_embeddings
from models.frame_unet import FrameUnet
from models.lora_layers import LoraLayers
from models.request import VideoRequest
from models.schedulers import DiffusionSchedules, advance, begin_at
from models.stages import OneAtATime
from models.start_image import padded_image
from models.step_cache import StepCache
from models.tensors import DenoiseState, Frames
from models.tiles import chunk_of, chunk_starts, stream_frames
from models.weights import (
    choose_device,
    choose_dtype,
    load_component,
    loading_device,
    store_weights,
)
from parallel.mesh import Mesh
from parallel.plan import FrameShape

# The publishers' own where nothing is said.
MOTION_BUCKET, NOISE_AUG_STRENGTH, MIN_GUIDANCE_SCALE = 127, 0.02, 1.0
# What makes that bucket of 0.7, the founding API's default.
MOTION_BUCKETS = 181.4


class SvdEncoder:
    """CLIP's embedding of the start image, and its latents after a little noise."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        dtype = choose_dtype(self.device, model.compute)
        image_encoder = load_component(
            CLIPVisionModelWithProjection, model.folder / "image_encoder", dtype, self.device
        )
        vae = _load_vae(model, dtype, self.device)
        vae.decoder = None
        self.pipeline = StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=image_encoder,
            unet=None,
            scheduler=None,
            feature_extractor=CLIPImageProcessor.from_pretrained(
                model.folder / "feature_extractor", local_files_only=True
            ),
        )

    @torch.inference_mode()
    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
        embeddings: Embeddings | None = None,
    ) -> SvdConditioning:
        """The latents are made anew each time, since the noise in them is the request's own.

        ValueError without a start image, which no admitted request lacks.
        """
        if start_image is None or source_frames is not None:
            raise ValueError("Stable Video Diffusion makes videos from an image")
        width, height = self.model.spec.generated_size(request.width, request.height)
        image = padded_image(start_image, generated_size=(width, height))
        kept = embeddings or no_embeddings()
        key = ("image", digest(start_image), image.size)
        (embedding,) = kept.get(key, lambda: (self._embed(image),))
        pixels = self.pipeline.video_processor.preprocess(image, height, width).to(self.device)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        noise = randn_tensor(pixels.shape, generator=generator, device=self.device)
        pixels = pixels + _noise_aug_strength(request) * noise
        latents = self.pipeline._encode_vae_image(pixels, self.device, 1, False)
        kept.note_pass()
        return SvdConditioning(
            embedding=embedding,
            latents=latents[0].float().cpu().numpy(),
            generator=generator.get_state().numpy(),
            guided=request.guided,
        )

    def _embed(self, image: Image.Image) -> FloatArray:
        """CLIP's, [1, D]."""
        embedding = self.pipeline._encode_image(image, self.device, 1, False)
        read: FloatArray = embedding[0].float().cpu().numpy()
        return read


class SvdDenoiser(OneAtATime[SvdConditioning]):
    """Euler steps on velocity prediction; guidance grows from the first frame to the last."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.dtype = choose_dtype(self.device, model.compute)
        unet = load_component(
            UNetSpatioTemporalConditionModel,
            model.folder / "unet",
            self.dtype,
            loading_device(model.compute, self.device),
        )
        use_attention(unet, model.compute, self.device, self.dtype)
        self.unet = FrameUnet(unet)
        self.loras = LoraLayers(unet, model.loras)
        store_weights(unet, model.compute, self.device, self.dtype)
        self.schedules = DiffusionSchedules(model.folder)
        self.step_cache = StepCache()

    def use(self, mesh: Mesh) -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        self.unet.use(mesh)

    def shape(self, request: VideoRequest, num_texts: int) -> FrameShape:
        """What a step of the request costs."""
        return self.unet.shape(self.model, request, num_texts)

    def num_blocks(self, request: VideoRequest, num_texts: int) -> int:
        """The UNet's; it is run through once, by whomever for which text."""
        return self.unet.num_blocks

    @torch.inference_mode()
    def start(self, request: VideoRequest, conditioning: SvdConditioning) -> DenoiseState:
        """Noise from the request's generator, after the encoder has drawn what it adds."""
        generator = torch.Generator("cpu")
        generator.set_state(torch.tensor(conditioning.generator))
        channels, height, width = conditioning.latents.shape
        noise = torch.randn((1, request.num_frames, channels, height, width), generator=generator)
        schedule = self.schedules.schedule(request, self.device)
        latents = (noise.to(self.device) * schedule.init_noise_sigma).transpose(1, 2)
        return DenoiseState(latents.contiguous(), 0, request.num_steps, generator.get_state())

    @torch.inference_mode()
    def step(
        self, request: VideoRequest, conditioning: SvdConditioning, state: DenoiseState
    ) -> DenoiseState:
        """One Euler step."""
        self.loras.use(request.loras)
        schedule = self.schedules.schedule(request, self.device)
        timestep = begin_at(schedule, state.step)
        latents = state.latents.transpose(1, 2)  # [1, F, C, H, W], as the UNet has them
        scaled = schedule.scale_model_input(latents, timestep)
        image = torch.tensor(conditioning.latents, device=self.device)
        image = image.expand(1, request.num_frames, *image.shape)
        embedding = torch.tensor(conditioning.embedding, dtype=self.dtype, device=self.device)[None]
        added = [request.fps - 1, _motion_bucket(request), _noise_aug_strength(request)]
        added_ids = torch.tensor([added], dtype=self.dtype, device=self.device)

        def call(sees_image: Sequence[bool], frames: slice) -> Tensor:
            beside = torch.cat([_or_zeros(image[:, frames], sees) for sees in sees_image])
            noisy = scaled[:, frames].expand(len(sees_image), -1, -1, -1, -1)
            velocity: Tensor = self.unet.unet(
                torch.cat([noisy, beside], dim=2).to(self.dtype),
                timestep,
                encoder_hidden_states=torch.cat(
                    [_or_zeros(embedding, sees) for sees in sees_image]
                ),
                added_time_ids=added_ids.expand(len(sees_image), -1),
                return_dict=False,
            )[0]
            return velocity

        scales = torch.linspace(
            _min_guidance_scale(request), request.guidance_scale, request.num_frames
        ).to(self.device)

        def predict(guided: bool) -> Tensor:
            sees_image = [False, True] if guided else [True]
            predicted = self.unet.predict(sees_image, request.num_frames, call, frame_dim=1)
            return guide(predicted, scales[None, :, None, None, None])

        predicted = self.step_cache.predict(request, state, scaled, predict, self.unet.mesh)
        made = advance(schedule, predicted.prediction, timestep, latents, state)
        made = replace(made, latents=made.latents.transpose(1, 2).contiguous())
        return predicted.note(made, state)


class SvdDecoder:
    """Decodes runs of decode_chunk_frames; the frames of a run look at each other."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.vae = _load_vae(model, choose_dtype(self.device, model.compute), self.device)
        self.vae.encoder = None

    @torch.inference_mode()
    def decode(self, request: VideoRequest, latents: FloatArray) -> Iterator[Frames]:
        """Frames cut, from the middle, to the asked size."""
        chunks = (
            self.decode_chunk(chunk_of(self.model, latents, start))
            for start in chunk_starts(self.model, request)
        )
        yield from stream_frames(chunks, request)

    @torch.inference_mode()
    def decode_chunk(self, latents: FloatArray) -> FloatArray:
        """[1, C, F, h, w] -> [3, F, H, W], frames that look at each other."""
        scaled = torch.tensor(latents[0], device=self.device).transpose(0, 1)
        scaled = (1 / self.vae.config.scaling_factor * scaled).to(self.vae.dtype)
        decoded = self.vae.decode(scaled, num_frames=len(scaled)).sample
        pixels: FloatArray = decoded.transpose(0, 1).float().cpu().numpy()
        return pixels


def _load_vae(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """In float32 where float16 would overflow, as the checkpoint says."""
    vae = load_component(AutoencoderKLTemporalDecoder, model.folder / "vae", dtype, device)
    return vae.float() if dtype is torch.float16 and vae.config.force_upcast else vae


def _or_zeros(given: Tensor, is_given: bool) -> Tensor:
    return given if is_given else torch.zeros_like(given)


def _motion_bucket(request: VideoRequest) -> int:
    if request.motion_bucket_id is not None:
        return request.motion_bucket_id
    if request.motion_strength is not None:
        return round(MOTION_BUCKETS * request.motion_strength)
    return MOTION_BUCKET


def _noise_aug_strength(request: VideoRequest) -> float:
    given = request.noise_aug_strength
    return NOISE_AUG_STRENGTH if given is None else given


def _min_guidance_scale(request: VideoRequest) -> float:
    given = request.min_guidance_scale
    return MIN_GUIDANCE_SCALE if given is None else given
