"""AnimateDiff: Stable Diffusion 1.5 with a motion module, up to 32 frames at a time.

Follows `diffusers.AnimateDiffPipeline` (Guo et al., arXiv:2307.04725), and to change a video
`AnimateDiffVideoToVideoPipeline`, from the mode of the VAE's posterior rather than a sample of it.
"""

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
from models.catalog import Model
from models.conditioning import AnimateDiffConditioning, FloatArray
from models.control import ControlNet
from models.denoise import guide
from models.embeddings import Embeddings, digest, no_embeddings
from models.frame_unet import FrameUnet
from models.lora_layers import LoraLayers
from models.request import VideoRequest
from models.schedulers import DiffusionSchedules, advance, begin_at
from models.spec import has_whole_motion_unet
from models.stages import OneAtATime
from models.start_image import decode_png, pad_frames, pad_pixels
from models.tensors import DenoiseState, Frames
from models.tiles import stream_frames
from models.weights import choose_device, choose_dtype, load_component
from parallel.mesh import Mesh
from parallel.plan import FrameShape


class AnimateDiffEncoder:
    """CLIP's states for the words, the VAE's latents for a video that is to be changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        dtype = choose_dtype(self.device)
        self.vae = load_component(AutoencoderKL, model.folder / "vae", dtype, self.device)
        self.vae.decoder = None
        self.pipeline = AnimateDiffPipeline(
            vae=None,
            text_encoder=load_component(
                CLIPTextModel, model.folder / "text_encoder", dtype, self.device
            ),
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
            negative = self._encode_text(request.negative_prompt, kept)
        source_latents = None
        if source_frames is not None:
            numbers = np.minimum(np.arange(request.num_frames), len(source_frames) - 1)
            frames = source_frames[numbers]
            key = ("frames", digest(frames), frames.shape)
            (source_latents,) = kept.get(key, lambda: (self._encode_frames(frames),))
        return AnimateDiffConditioning(
            positive=self._encode_text(request.prompt, kept),
            negative=negative,
            source_latents=source_latents,
            num_tokens=len(self.pipeline.tokenizer(request.prompt)["input_ids"]),
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

    def _encode_text(self, text: str, kept: Embeddings) -> FloatArray:
        """[77, D]"""

        def encode() -> tuple[FloatArray]:
            states, _ = self.pipeline.encode_prompt(text, self.device, 1, False)
            return (states[0].float().cpu().numpy(),)

        (states,) = kept.get(("text", text), encode)
        return states

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
        self.dtype = choose_dtype(self.device)
        unet = _load_unet(model, self.dtype, self.device)
        self.controls = AnimateDiffControls(model.controls, self.dtype, self.device)
        self.unet = FrameUnet(unet, self.controls.shardings)
        self.loras = LoraLayers(self.unet.unet, model.loras)
        self.schedules = DiffusionSchedules(model.folder)

    def use(self, mesh: Mesh) -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        self.unet.use(mesh)

    def shape(self, request: VideoRequest, num_texts: int) -> FrameShape:
        """What a step of the request costs."""
        beside = self.controls.num_parameters(nets_of(self.model, request))
        return self.unet.shape(self.model, request, num_texts, beside)

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

        predicted = self.unet.predict(conditioning.texts, request.num_frames, call, frame_dim=2)
        guided = guide(predicted, request.guidance_scale)
        return advance(schedule, guided, timestep, state.latents, state)


class AnimateDiffDecoder:
    """The image VAE, frame by frame, decode_chunk_frames at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.vae = load_component(
            AutoencoderKL, model.folder / "vae", choose_dtype(self.device), self.device
        )
        self.vae.encoder = None

    @torch.inference_mode()
    def decode(self, request: VideoRequest, latents: FloatArray) -> Iterator[Frames]:
        """Frames cut, from the middle, to the asked size."""
        scaled = 1 / self.vae.config.scaling_factor * torch.tensor(latents[0], device=self.device)
        chunks = (
            self.vae.decode(chunk).sample
            for chunk in scaled.transpose(0, 1)
            .to(self.vae.dtype)
            .split(self.model.manifest.decode_chunk_frames)
        )
        yield from stream_frames(
            (chunk.transpose(0, 1).float().cpu().numpy() for chunk in chunks), request
        )


def _load_unet(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """One `UNetMotionModel`, or Stable Diffusion's UNet and a motion adapter put together."""
    folder = model.folder / "unet"
    if has_whole_motion_unet(model.folder):
        return load_component(UNetMotionModel, folder, dtype, device)
    unet = load_component(UNet2DConditionModel, folder, dtype, device)
    adapter = load_component(MotionAdapter, model.folder / "motion_adapter", dtype, device)
    joined = UNetMotionModel.from_unet2d(unet, adapter)
    return joined.to(device, dtype).eval().requires_grad_(False)
