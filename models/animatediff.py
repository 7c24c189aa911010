"""AnimateDiff: Stable Diffusion 1.5 with a motion module, up to 32 frames at a time, and more by
FreeNoise.

Follows `diffusers.AnimateDiffPipeline` (Guo et al., arXiv:2307.04725), and to change a video
`AnimateDiffVideoToVideoPipeline`, from the mode of the VAE's posterior rather than a sample of it.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel
from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from models.animatediff_control import AnimateDiffControls, as_pixels, leads_of, nets_of
from models.attention import use_attention
from models.catalog import Model
from models.conditioning import AnimateDiffConditioning, FloatArray
from models.control import ControlNet
from models.denoise import guide
from models.embeddings import Embeddings, digest, no_embeddings
from models.frame_unet import FrameUnet
from models.free_noise import MotionWindows, shuffle_noise
from models.lora_layers import Half, LoraLayers
from models.request import LoraUse, VideoRequest
from models.schedulers import DiffusionSchedules, advance, begin_at
from models.spec import has_whole_motion_unet
from models.stages import OneAtATime
from models.start_image import decode_png, pad_frames, pad_pixels
from models.step_cache import StepCache
from models.tensors import DenoiseState, Frames
from models.text_loras import TextLoras
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


class AnimateDiffEncoder:
    """CLIP's states for the words, the VAE's latents for a video that is to be changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        dtype = choose_dtype(self.device, model.compute)
        self.vae = load_component(AutoencoderKL, model.folder / "vae", dtype, self.device)
        self.vae.decoder = None
        text_encoder = load_component(
            CLIPTextModel, model.folder / "text_encoder", dtype, self.device
        )
        self.loras = TextLoras(text_encoder, model.loras)
        # A tokenizer holds how it pads and cuts: one call changes it for another thread's.
        self.tokenizing = threading.Lock()
        self.pipeline = AnimateDiffPipeline(
            vae=None,
            text_encoder=text_encoder,
            tokenizer=AutoTokenizer.from_pretrained(
                model.folder / "tokenizer", local_files_only=True, trust_remote_code=False
            ),
            unet=None,
            motion_adapter=None,
            scheduler=None,
        )

    @torch.inference_mode()
    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
        embeddings: Embeddings | None = None,
    ) -> AnimateDiffConditioning:
        """ValueError with a start image that nothing leads by, which no admitted request has."""
        kept = embeddings or no_embeddings()
        start = None
        if start_image is not None:
            net = self.model.start_control
            if net is None:
                raise ValueError(f"{self.model.id} has no control network for a start image")
            pixels = decode_png(start_image)[None]
            start = self._encode_pictures(net, pixels, kept)
        negative = None
        if request.guided:
            negative = self._encode_text(request.negative_prompt, request.loras, kept)
        source_latents = None
        if source_frames is not None:
            numbers = np.minimum(np.arange(request.num_frames), len(source_frames) - 1)
            frames = source_frames[numbers]
            key = ("frames", digest(frames), frames.shape)
            (source_latents,) = kept.get(key, lambda: (self._encode_frames(frames),))
        return AnimateDiffConditioning(
            positive=self._encode_text(request.prompt, request.loras, kept),
            negative=negative,
            source_latents=source_latents,
            num_tokens=self._count_tokens(request.prompt),
            start=start,
        )

    @torch.inference_mode()
    def encode_control(
        self,
        request: VideoRequest,
        frames: NDArray[np.uint8],
        embeddings: Embeddings | None = None,
    ) -> FloatArray:
        """Pixels [3, F, H, W] in 0..1, or latents [C, F, H, W]: as the network takes them."""
        assert request.control is not None
        net = self.model.control_net(request.control.type)
        if not net.is_sparse:
            frames = frames[np.minimum(np.arange(request.num_frames), len(frames) - 1)]
        return self._encode_pictures(net, frames, embeddings or no_embeddings())

    def _encode_pictures(
        self, net: ControlNet, frames: NDArray[np.uint8], kept: Embeddings
    ) -> FloatArray:
        if net.takes_latents:
            key = ("frames", digest(frames), frames.shape)
            (latents,) = kept.get(key, lambda: (self._encode_frames(frames),))
            return latents
        height, width = frames.shape[1:3]
        size = self.model.spec.generated_size(width, height)
        return as_pixels(pad_pixels(frames, size))

    def _encode_text(self, text: str, loras: Sequence[LoraUse], kept: Embeddings) -> FloatArray:
        """[77, D]"""

        def encode() -> tuple[FloatArray]:
            with self.tokenizing, self.loras.used(loras):
                states, _ = self.pipeline.encode_prompt(text, self.device, 1, False)
            return (states[0].float().cpu().numpy(),)

        (states,) = kept.get(("text", text, self.loras.key(loras)), encode)
        return states

    def _count_tokens(self, text: str) -> int:
        """Before anything is cut off."""
        with self.tokenizing:
            return len(self.pipeline.tokenizer(text)["input_ids"])

    def _encode_frames(self, frames: NDArray[np.uint8]) -> FloatArray:
        """uint8 [F, H, W, 3] -> [C, F, H/8, W/8]."""
        height, width = frames.shape[1:3]
        size = self.model.spec.generated_size(width, height)
        pixels = (
            torch.from_numpy(pad_frames(frames, generated_size=size)).transpose(0, 1).contiguous()
        )
        encoded = [
            self.vae.encode(chunk.to(self.device, self.vae.dtype)).latent_dist.mode().float()
            for chunk in pixels.split(self.model.manifest.decode_chunk_frames)
        ]
        scaled = self.vae.config.scaling_factor * torch.cat(encoded)
        latents: FloatArray = scaled.transpose(0, 1).cpu().numpy()
        return latents


class AnimateDiffDenoiser(OneAtATime[AnimateDiffConditioning]):
    """Classifier-free guidance over a UNet whose motion modules see all frames."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.dtype = choose_dtype(self.device, model.compute)
        unet = _load_unet(model, self.dtype, loading_device(model.compute, self.device))
        use_attention(unet, model.compute, self.device, self.dtype)
        self.controls = AnimateDiffControls(model.controls, self.dtype, self.device)
        self.windows = MotionWindows(unet)
        self.unet = FrameUnet(unet, self.controls.shardings)
        self.loras = LoraLayers(self.unet.unet, model.loras, Half.DENOISER)
        store_weights(unet, model.compute, self.device, self.dtype)
        self.schedules = DiffusionSchedules(model.folder)
        self.step_cache = StepCache()

    def use(self, mesh: Mesh) -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        self.unet.use(mesh)

    def shape(self, request: VideoRequest, num_texts: int) -> FrameShape:
        """What a step of the request costs."""
        beside = self.controls.num_parameters(nets_of(self.model, request))
        return self.unet.shape(self.model, request, num_texts, beside)

    def num_blocks(self, request: VideoRequest, num_texts: int) -> int:
        """The UNet's; it is run through once, by whomever for which text."""
        return self.unet.num_blocks

    @torch.inference_mode()
    def start(self, request: VideoRequest, conditioning: AnimateDiffConditioning) -> DenoiseState:
        """Noise from the seed alone; a source video with as much of it as `strength` says."""
        channels = self.unet.unet.config.in_channels
        shape = (1, channels, *self.model.spec.latent_size(request))
        generator = torch.Generator("cpu").manual_seed(request.seed)
        noise = torch.randn(shape, generator=generator).to(self.device)
        schedule = self.schedules.schedule(request, self.device)
        first = 0
        if conditioning.source_latents is None:
            if request.free_noise is not None:
                noise = shuffle_noise(noise, request.free_noise, generator)
            latents = noise * schedule.init_noise_sigma
        else:
            first = request.first_step
            source = torch.tensor(conditioning.source_latents, device=self.device)[None]
            latents = schedule.add_noise(source, noise, schedule.timesteps[first : first + 1])
        return DenoiseState(latents, first, request.num_steps, generator.get_state())

    @torch.inference_mode()
    def step(
        self, request: VideoRequest, conditioning: AnimateDiffConditioning, state: DenoiseState
    ) -> DenoiseState:
        """One step."""
        self.loras.use(request.loras)
        self.windows.use(request.free_noise)
        schedule = self.schedules.schedule(request, self.device)
        timestep = begin_at(schedule, state.step)
        scaled = schedule.scale_model_input(state.latents, timestep)
        leads = leads_of(self.model, request, conditioning, state.step)

        def call(texts: Sequence[FloatArray], frames: slice) -> Tensor:
            states = torch.tensor(np.stack(texts), dtype=self.dtype, device=self.device)
            noisy = scaled[:, :, frames].expand(len(texts), -1, -1, -1, -1).to(self.dtype)
            states = states.repeat_interleave(noisy.shape[2], dim=0)
            added = self.controls.residuals(
                leads, noisy, timestep, states, frames, request.num_frames
            )
            down, middle = (None, None) if added is None else added
            noise: Tensor = self.unet.unet(
                noisy,
                timestep,
                encoder_hidden_states=states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
            return noise

        def predict(guided: bool) -> Tensor:
            texts = conditioning.texts if guided else conditioning.texts[-1:]
            predicted = self.unet.predict(texts, request.num_frames, call, frame_dim=2)
            return guide(predicted, request.guidance_scale)

        predicted = self.step_cache.predict(request, state, scaled, predict, self.unet.mesh)
        made = advance(schedule, predicted.prediction, timestep, state.latents, state)
        return predicted.note(made, state)


class AnimateDiffDecoder:
    """The image VAE, frame by frame, decode_chunk_frames at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.vae = load_component(
            AutoencoderKL,
            model.folder / "vae",
            choose_dtype(self.device, model.compute),
            self.device,
        )
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
        """[1, C, F, h, w] -> [3, F, H, W]"""
        scaled = 1 / self.vae.config.scaling_factor * torch.tensor(latents[0], device=self.device)
        decoded = self.vae.decode(scaled.transpose(0, 1).to(self.vae.dtype)).sample
        pixels: FloatArray = decoded.transpose(0, 1).float().cpu().numpy()
        return pixels


def _load_unet(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """One `UNetMotionModel`, or Stable Diffusion's UNet and a motion adapter put together."""
    folder = model.folder / "unet"
    if has_whole_motion_unet(model.folder):
        return load_component(UNetMotionModel, folder, dtype, device)
    unet = load_component(UNet2DConditionModel, folder, dtype, device)
    adapter = load_component(MotionAdapter, model.folder / "motion_adapter", dtype, device)
    joined = UNetMotionModel.from_unet2d(unet, adapter)
    return joined.to(device, dtype).eval().requires_grad_(False)
