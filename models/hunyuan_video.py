"""HunyuanVideo: text-to-video, and image-to-video in both published variants.

Follows `diffusers.HunyuanVideoPipeline` and `HunyuanVideoImageToVideoPipeline` (Kong et al.,
arXiv:2412.03603), but texts are trimmed to their tokens, so that attention needs no mask.
"""

import copy
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    HunyuanVideoImageToVideoPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    LlamaModel,
    LlavaForConditionalGeneration,
)

from models.attention import use_attention
from models.catalog import Model
from models.conditioning import FloatArray, HunyuanConditioning, HunyuanText
from models.denoise import guide
from models.embeddings import Embeddings, digest, no_embeddings
from models.lora_layers import LoraLayers
from models.pausing import let_pause
from models.request import VideoRequest
from models.spec import Use, read_json
from models.stages import OneAtATime
from models.start_image import padded_image
from models.step_cache import FirstBlock, StepCache
from models.tensors import DenoiseState, Frames
from models.tiles import stream_frames
from models.transformer_sharding import shard_hunyuan_video
from models.weights import (
    choose_device,
    choose_dtype,
    load_component,
    loading_device,
    store_weights,
)
from parallel.guidance import predict_each
from parallel.mesh import Mesh, MeshBuilder
from parallel.plan import ParallelPlan, TokenShape

# Of the noise in what image-to-video begins with; the rest is the start image.
START_NOISE = 0.999
# Every so manieth of the image's tokens goes to the transformer; of the black image that stands
# beside a negative prompt it is every second, in both variants.
INTERLEAVE = {"latent_concat": 2, "token_replace": 4}
NEGATIVE_INTERLEAVE = 2


class HunyuanVideoEncoder:
    """Llama's states for the words, or LLaVA's for image and words; and CLIP's pooled ones."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        dtype = choose_dtype(self.device, model.compute)
        folder = model.folder
        self.from_image = model.spec.start_image is Use.REQUIRED
        parts: dict[str, Any] = {
            "tokenizer": _load_tokenizer(model, "tokenizer"),
            "tokenizer_2": _load_tokenizer(model, "tokenizer_2"),
            "text_encoder": load_component(
                LlavaForConditionalGeneration if self.from_image else LlamaModel,
                folder / "text_encoder",
                dtype,
                self.device,
            ),
            "text_encoder_2": load_component(
                CLIPTextModel, folder / "text_encoder_2", dtype, self.device
            ),
            "transformer": None,
            "scheduler": None,
            "vae": None,
        }
        self.pipeline: Any
        # A tokenizer holds how it pads and cuts: one call changes it for another thread's.
        self.tokenizing = threading.Lock()
        self.interleave = 1
        if self.from_image:
            parts["image_processor"] = CLIPImageProcessor.from_pretrained(
                folder / "image_processor", local_files_only=True
            )
            self.vae = load_component(AutoencoderKLHunyuanVideo, folder / "vae", dtype, self.device)
            self.vae.decoder = None
            self.pipeline = HunyuanVideoImageToVideoPipeline(**parts)
            config = read_json(folder / "transformer" / "config.json")
            self.interleave = INTERLEAVE[config["image_condition_type"]]
        else:
            self.pipeline = HunyuanVideoPipeline(**parts)

    @torch.inference_mode()
    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
        embeddings: Embeddings | None = None,
    ) -> HunyuanConditioning:
        """ValueError for an image that is missing or of no use; no admitted request is so."""
        if (start_image is not None) != self.from_image or source_frames is not None:
            raise ValueError(f"{self.model.id} can't be made from these inputs")
        size = self.model.spec.generated_size(request.width, request.height)
        kept = embeddings or no_embeddings()
        image = black = start_latents = None
        if start_image is not None:
            image = padded_image(start_image, generated_size=size)
            black = Image.new("RGB", size)
            latents = self._encode_image
            key = ("image", digest(image.tobytes()), size)
            (start_latents,) = kept.get(key, lambda: (latents(image),))
        negative = None
        if request.guided:
            negative = self._encode_text(request.negative_prompt, black, NEGATIVE_INTERLEAVE, kept)
        return HunyuanConditioning(
            positive=self._encode_text(request.prompt, image, self.interleave, kept),
            negative=negative,
            start_latents=start_latents,
            num_tokens=self._count_tokens(request.prompt),
        )

    def _encode_text(
        self, text: str, image: Image.Image | None, interleave: int, kept: Embeddings
    ) -> HunyuanText:
        seen = None if image is None else (digest(image.tobytes()), image.size, interleave)
        states, pooled = kept.get(
            ("text", text, seen), lambda: self._states(text, image, interleave)
        )
        return HunyuanText(states, pooled)

    def _states(
        self, text: str, image: Image.Image | None, interleave: int
    ) -> tuple[FloatArray, FloatArray]:
        """Of the text's tokens, [N, D], and CLIP's pooled ones, [P]."""
        limits: dict[str, Any] = {"max_sequence_length": self.model.manifest.max_text_tokens}
        if image is not None:
            limits |= {"image": image, "image_embed_interleave": interleave}
        with self.tokenizing:
            states, pooled, mask = self.pipeline.encode_prompt(
                prompt=text, device=self.device, **limits
            )
        valid = states[0][mask[0].bool()]
        return valid.float().cpu().numpy(), pooled[0].float().cpu().numpy()

    def _count_tokens(self, text: str) -> int:
        """Before anything is cut off."""
        with self.tokenizing:
            return len(self.pipeline.tokenizer(text)["input_ids"])

    def _encode_image(self, image: Image.Image) -> FloatArray:
        """-> [C, 1, H/8, W/8], scaled as the transformer has them."""
        pixels = self.pipeline.video_processor.preprocess(image, image.height, image.width)
        video = pixels.to(self.device, self.vae.dtype).unsqueeze(2)
        latents = self.vae.encode(video).latent_dist.mode().float()
        scaled: FloatArray = (latents * self.vae.config.scaling_factor)[0].cpu().numpy()
        return scaled


class HunyuanVideoDenoiser(OneAtATime[HunyuanConditioning]):
    """Flow matching; guidance is an input of the transformer, true_cfg_scale the classic one."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.dtype = choose_dtype(self.device, model.compute)
        self.transformer = load_component(
            HunyuanVideoTransformer3DModel,
            model.folder / "transformer",
            self.dtype,
            loading_device(model.compute, self.device),
        )
        self.condition = self.transformer.config.image_condition_type
        use_attention(self.transformer, model.compute, self.device, self.dtype)
        self.loras = LoraLayers(self.transformer, model.loras)
        store_weights(self.transformer, model.compute, self.device, self.dtype)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            model.folder / "scheduler", local_files_only=True
        )
        self.sharding = shard_hunyuan_video(self.transformer)
        self.step_cache = StepCache(
            FirstBlock(self.transformer.transformer_blocks[0], self.sharding)
        )
        self.blocks = [
            *self.transformer.transformer_blocks,
            *self.transformer.single_transformer_blocks,
        ]
        let_pause(self.blocks)
        self.use(MeshBuilder(0, 1).mesh(ParallelPlan(), (0,)))

    def use(self, mesh: Mesh) -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        self.mesh = mesh
        self.sharding.use(mesh.part, mesh.ulysses, mesh.ring)

    def shape(self, request: VideoRequest, num_texts: int) -> TokenShape:
        """What a step of the request costs, from the transformer's own configuration."""
        frames, height, width = self.model.spec.latent_size(request)
        config = self.transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        tokens = self._num_tokens(request) + self.model.manifest.max_text_tokens
        weights = sum(weight.numel() for block in self.blocks for weight in block.parameters())
        activations = float(tokens * dim)
        return TokenShape(
            num_texts=num_texts,
            num_tokens=tokens,
            num_heads=config.num_attention_heads,
            num_layers=len(self.blocks),
            linear_flops=num_texts * 2.0 * weights * tokens,
            attention_flops=num_texts * 4.0 * len(self.blocks) * tokens * activations,
            activation_bytes=activations * self.dtype.itemsize,
            latent_bytes=4.0 * self._num_channels * frames * height * width,
        )

    def num_blocks(self, request: VideoRequest, num_texts: int) -> int:
        """Of a pass for each text that is this rank's."""
        return len(self.blocks) * math.ceil(num_texts / self.mesh.guidance.size)

    @torch.inference_mode()
    def start(self, request: VideoRequest, conditioning: HunyuanConditioning) -> DenoiseState:
        """Noise from the seed alone; with a start image, a thousandth of it in every frame."""
        generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = (1, self._num_channels, *self.model.spec.latent_size(request))
        latents = torch.randn(shape, generator=generator).to(self.device)
        start = self._start_latents(conditioning)
        if start is not None:
            share = torch.tensor([START_NOISE], device=self.device)
            latents = latents * share + start * (1 - share)
        return DenoiseState(latents, 0, request.num_steps, generator.get_state())

    @torch.inference_mode()
    def step(
        self, request: VideoRequest, conditioning: HunyuanConditioning, state: DenoiseState
    ) -> DenoiseState:
        """One Euler step."""
        self.loras.use(request.loras)
        scheduler = self._schedule(request)
        scheduler.set_begin_index(state.step)
        timestep = scheduler.timesteps[state.step]
        start = self._start_latents(conditioning)
        seen = self._with_start(state.latents, start)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.tensor([request.guidance_scale], dtype=self.dtype) * 1000.0
            guidance = guidance.to(self.device)

        def predict(text: HunyuanText) -> Tensor:
            states = torch.tensor(text.states, dtype=self.dtype, device=self.device)[None]
            velocity: Tensor = self.transformer(
                hidden_states=seen.to(self.dtype),
                timestep=timestep.expand(1),
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(
                    states.shape[:2], dtype=self.dtype, device=self.device
                ),
                pooled_projections=torch.tensor(text.pooled, dtype=self.dtype, device=self.device)[
                    None
                ],
                guidance=guidance,
                return_dict=False,
            )[0]
            return velocity

        def predict_guided(guided: bool) -> Tensor:
            texts = conditioning.texts if guided else conditioning.texts[-1:]
            predicted = predict_each(self.mesh.guidance, texts, predict)
            return guide(predicted, request.true_cfg_scale or 1.0)

        predicted = self.step_cache.predict(
            request, state, state.latents, predict_guided, self.mesh, self._num_tokens(request)
        )
        velocity = predicted.prediction
        if start is not None and self.condition == "token_replace":
            stepped = scheduler.step(
                velocity[:, :, 1:], timestep, state.latents[:, :, 1:], return_dict=False
            )[0]
            latents = torch.cat([start, stepped], dim=2)
        else:
            latents = scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
        return predicted.note(replace(state, latents=latents, step=state.step + 1), state)

    def _num_tokens(self, request: VideoRequest) -> int:
        """Of the video."""
        frames, height, width = self.model.spec.latent_size(request)
        config = self.transformer.config
        area = (height // config.patch_size) * (width // config.patch_size)
        tokens: int = frames // config.patch_size_t * area
        return tokens

    @property
    def _num_channels(self) -> int:
        """Of the latents; a concatenated start image adds as many, and a mask."""
        channels: int = self.transformer.config.in_channels
        return (channels - 1) // 2 if self.condition == "latent_concat" else channels

    def _schedule(self, request: VideoRequest) -> FlowMatchEulerDiscreteScheduler:
        scheduler = copy.deepcopy(self.scheduler)
        if request.flow_shift is not None:
            scheduler.set_shift(request.flow_shift)
        sigmas = np.linspace(1.0, 0.0, request.num_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        return scheduler

    def _start_latents(self, conditioning: HunyuanConditioning) -> Tensor | None:
        """[1, C, 1, H, W]"""
        if conditioning.start_latents is None:
            return None
        return torch.tensor(conditioning.start_latents, device=self.device)[None]

    def _with_start(self, latents: Tensor, start: Tensor | None) -> Tensor:
        """What the transformer sees: latents, and the start image beside or in place of some."""
        if start is None:
            return latents
        if self.condition == "token_replace":
            return torch.cat([start, latents[:, :, 1:]], dim=2)
        beside = torch.zeros_like(latents)
        beside[:, :, :1] = start
        mask = torch.zeros_like(latents[:, :1])
        mask[:, :, :1] = 1
        return torch.cat([latents, beside, mask], dim=1)


class HunyuanVideoDecoder:
    """Decodes runs of latent frames, each in tiles, and blends every run with the one before.

    Bit-equal to `AutoencoderKLHunyuanVideo.decode` with tiling, whose loop over runs this is.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.vae = load_component(
            AutoencoderKLHunyuanVideo,
            model.folder / "vae",
            choose_dtype(self.device, model.compute),
            self.device,
        )
        self.vae.encoder = None
        self.vae.enable_tiling()

    @torch.inference_mode()
    def decode(self, request: VideoRequest, latents: FloatArray) -> Iterator[Frames]:
        """Frames trimmed to the asked count and, from the middle, to the asked size."""
        scaled = torch.tensor(latents, device=self.device).to(self.vae.dtype)
        scaled = scaled / self.vae.config.scaling_factor
        chunks = (chunk[0].float().cpu().numpy() for chunk in self._decode_runs(scaled))
        yield from stream_frames(chunks, request, self.model.spec.dropped_frames)

    def _decode_runs(self, latents: Tensor) -> Iterator[Tensor]:
        """[1, 3, F, H, W], in temporal order."""
        vae = self.vae
        run = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
        if latents.shape[2] <= run:
            yield vae.decode(latents).sample
            return
        stride = vae.tile_sample_stride_num_frames
        blended = vae.tile_sample_min_num_frames - stride
        before: Tensor | None = None
        for first in range(0, latents.shape[2], stride // vae.temporal_compression_ratio):
            decoded = self._decode_run(latents[:, :, first : first + run + 1])
            if before is None:
                yield decoded[:, :, : stride + 1]
            else:
                decoded = vae.blend_t(before, decoded[:, :, 1:], blended)
                yield decoded[:, :, :stride]
            before = decoded

    def _decode_run(self, latents: Tensor) -> Tensor:
        """One run, whatever its length."""
        vae = self.vae
        side = vae.tile_sample_min_height // vae.spatial_compression_ratio
        if max(latents.shape[-2:]) > side:
            return vae.tiled_decode(latents).sample
        return vae.decoder(vae.post_quant_conv(latents))


def _load_tokenizer(model: Model, part: str) -> Any:
    return AutoTokenizer.from_pretrained(
        model.folder / part, local_files_only=True, trust_remote_code=False
    )
