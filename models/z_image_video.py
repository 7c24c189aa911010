"""Z-Image video: diffusers' `ZImageTransformer2DModel` on the latents of a video or image VAE.

Follows `diffusers.ZImagePipeline` (text, velocity sign, timestep) with a frame axis; a start
frame's clean latent is held in place at every step, as the model was trained.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor

from models.attention import use_attention
from models.catalog import Model
from models.conditioning import FloatArray, TextPlaces, ZImageConditioning
from models.flow_schedules import FlowSchedules
from models.lora_layers import Half, LoraLayers
from models.pausing import let_pause
from models.regions import restrict
from models.request import Scheduler, VideoRequest
from models.schedulers import advance, begin_at
from models.step_cache import FirstBlock, Predicted, StepCache
from models.tensors import DenoiseState, Frames
from models.tiles import Box, stream_frames
from models.transformer_sharding import shard_z_image
from models.video_vae import ImageVae, WanVae, load_video_vae
from models.weights import (
    choose_device,
    choose_dtype,
    load_component,
    loading_device,
    store_weights,
)
from models.z_image_control import ZImageControl
from models.z_image_encoder import PATCH_SIZE
from parallel.guidance import predict_each
from parallel.mesh import Mesh, MeshBuilder
from parallel.plan import ParallelPlan, TokenShape

# Black is never less than no noise at all.
MASK_MARGIN = 1e-4
# Residuals by layer, for latents, times and texts.
Lead = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], dict[int, Tensor]]


class Row(NamedTuple):
    """What the transformer sees at once: latents [C, F, H, W], a time 0..1, a text [N, D], whose
    parts may have places.
    """

    latents: Tensor
    time: float
    text: FloatArray
    places: TextPlaces | None = None


class ZImageVideoDenoiser:
    """Flow matching with classifier-free guidance: negative + g * (positive - negative).

    The publishers count guidance from 0: their g is one less.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        self.dtype = choose_dtype(self.device, model.compute)
        self.transformer = load_component(
            ZImageTransformer2DModel,
            model.folder / "transformer",
            self.dtype,
            loading_device(model.compute, self.device),
        )
        use_attention(self.transformer, model.compute, self.device, self.dtype)
        self.loras = LoraLayers(self.transformer, model.loras, Half.DENOISER)
        store_weights(self.transformer, model.compute, self.device, self.dtype)
        self.schedules = FlowSchedules(model.folder)
        self.sharding = shard_z_image(self.transformer)
        self.step_cache = StepCache(FirstBlock(self.transformer.layers[0], self.sharding))
        self.controls = {
            net.id: ZImageControl(net, self.transformer, self.sharding) for net in model.controls
        }
        let_pause(self.transformer.layers)
        self.use(MeshBuilder(0, 1).mesh(ParallelPlan(), (0,)))

    def use(self, mesh: Mesh) -> None:
        """Share every step from now on with the mesh's other ranks, which are to do the same."""
        self.mesh = mesh
        self.sharding.use(mesh.part, mesh.ulysses, mesh.ring)

    def shape(self, request: VideoRequest, num_texts: int) -> TokenShape:
        """What a step of the request costs, from the transformer's own configuration."""
        frames, height, width = self.model.spec.latent_size(request)
        config = self.transformer.config
        tokens = self._num_tokens(request) + self.model.manifest.max_text_tokens
        weights = sum(weight.numel() for weight in self.transformer.layers.parameters())
        num_layers = config.n_layers
        if request.control is not None:
            control = self.controls[self.model.control_net(request.control.type).id]
            weights += control.own_parameters
            num_layers += control.num_layers
        num_passes = num_texts * (2 if request.scheduler is Scheduler.HEUN else 1)
        activations = float(tokens * config.dim)
        return TokenShape(
            num_texts=num_texts,
            num_tokens=tokens,
            num_heads=config.n_heads,
            num_layers=num_layers,
            linear_flops=num_passes * 2.0 * weights * tokens,
            attention_flops=num_passes * 4.0 * num_layers * tokens * activations,
            activation_bytes=activations * self.dtype.itemsize,
            latent_bytes=4.0 * config.in_channels * frames * height * width,
        )

    def _num_tokens(self, request: VideoRequest) -> int:
        """Of the video."""
        frames, height, width = self.model.spec.latent_size(request)
        return frames // request.f_patch_size * (height // PATCH_SIZE) * (width // PATCH_SIZE)

    def num_blocks(self, request: VideoRequest, num_texts: int) -> int:
        """Of a pass for all texts, where a rank that is alone makes them as one batch, else for
        each that is this rank's.
        """
        as_batch = self.mesh.degree == 1 and not _has_places(request)
        passes = 1 if as_batch else math.ceil(num_texts / self.mesh.guidance.size)
        passes *= 2 if request.scheduler is Scheduler.HEUN else 1
        return passes * len(self.transformer.layers)

    @torch.inference_mode()
    def start(self, request: VideoRequest, conditioning: ZImageConditioning) -> DenoiseState:
        """Noise at full shape from the seed alone, on the CPU: the same on every machine.

        A source video is noised to the level at which the last `strength` of the steps begins
        (SDEdit, arXiv:2108.01073); those before are not made.
        """
        generator = torch.Generator("cpu").manual_seed(request.seed)
        noise = self._noise(request, generator)
        last = request.last_step
        if conditioning.source_latents is None:
            return DenoiseState(noise, 0, last, generator.get_state())
        first = request.first_step
        sigma = float(self.schedules.schedule(request, self.device).sigmas[first])
        source = torch.tensor(conditioning.source_latents, device=self.device)[None]
        mixed = (1.0 - sigma) * source + sigma * noise
        return DenoiseState(mixed, first, last, generator.get_state())

    def step(
        self, request: VideoRequest, conditioning: ZImageConditioning, state: DenoiseState
    ) -> DenoiseState:
        """One step."""
        return self.step_all([request], [conditioning], [state])[0]

    def batch(self, request: VideoRequest) -> Hashable | None:
        """The size of the latents, of their patches, and the LoRAs; texts may differ in length.

        What is led, has several texts, steps by Heun's method or skips passes, makes its steps
        alone.
        """
        skips = request.step_cache is not None or bool(request.cfg_skip_ratio)
        by_heun = request.scheduler is Scheduler.HEUN
        if request.control is not None or _has_places(request) or skips or by_heun:
            return None
        size = self.model.spec.latent_size(request)
        return *size, request.f_patch_size, request.loras

    @torch.inference_mode()
    def step_all(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[ZImageConditioning],
        states: Sequence[DenoiseState],
    ) -> list[DenoiseState]:
        """One step of each; one rank makes all of their texts as one batch.

        Several ranks take one request, and each text by itself, without padding.
        """
        self.loras.use(requests[0].loras)
        schedules = [self.schedules.schedule(request, self.device) for request in requests]
        held = [
            _hold_start_frame(state.latents, conditioning)
            for state, conditioning in zip(states, conditionings, strict=True)
        ]
        times = [
            begin_at(schedule, state.step)
            for schedule, state in zip(schedules, states, strict=True)
        ]
        lead = self._lead(requests[0], conditionings[0], states[0])
        predictions = self._predictions(requests, conditionings, states, held, times, lead)
        made = []
        for request, told, state, schedule, time, latents, predicted in zip(
            requests, conditionings, states, schedules, times, held, predictions, strict=True
        ):
            slope = velocity = predicted.prediction
            if request.scheduler is Scheduler.HEUN and state.step + 1 < request.num_steps:
                sigma, after = schedule.sigmas[state.step : state.step + 2]
                ahead = _hold_start_frame(latents - (after - sigma) * velocity, told)
                later = [schedule.timesteps[state.step + 1]]
                (second,) = self._velocities([request], [told], [ahead], later, lead)
                slope = (velocity + second) / 2
            stepped = advance(schedule, -slope, time, latents, state)
            held_still = _hold_start_frame(stepped.latents, told)
            kept = self._keep_source(request, told, held_still, schedule.sigmas[state.step + 1])
            made.append(predicted.note(replace(stepped, latents=kept), state))
        return made

    def _predictions(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[ZImageConditioning],
        states: Sequence[DenoiseState],
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        lead: Lead | None,
    ) -> list[Predicted]:
        """Of each request; one that is alone may make do with less."""
        if len(requests) > 1:
            made = self._velocities(requests, conditionings, latents, timesteps, lead)
            return [Predicted(velocity) for velocity in made]
        (request,), (told,) = requests, conditionings

        def predict(guided: bool) -> Tensor:
            seen = told if guided else replace(told, negative=None)
            return self._velocities(requests, [seen], latents, timesteps, lead)[0]

        num_tokens = self._num_tokens(request)
        return [
            self.step_cache.predict(request, states[0], latents[0], predict, self.mesh, num_tokens)
        ]

    def _keep_source(
        self, request: VideoRequest, told: ZImageConditioning, latents: Tensor, sigma: Tensor
    ) -> Tensor:
        """The source, with as much noise as the rest has now, where the mask is darker than that.

        So a grey place is the source's in the noisy steps, and is made with the rest in the last
        ones; as InvokeAI's gradient masks.
        """
        if request.mask is None:
            return latents
        if told.mask is None or told.source_latents is None:
            raise ValueError("the mask or the video that it is of is not in the conditioning")
        source = torch.tensor(told.source_latents, device=self.device)[None]
        mask = torch.tensor(told.mask, device=self.device)
        noise = self._noise(request, torch.Generator("cpu").manual_seed(request.seed))
        known = (1.0 - sigma) * source + sigma * noise
        return torch.where(mask >= torch.clamp(sigma + MASK_MARGIN, max=1.0), latents, known)

    def _noise(self, request: VideoRequest, generator: torch.Generator) -> Tensor:
        """At full shape, on the CPU: the same on every machine."""
        shape = (1, self.transformer.config.in_channels, *self.model.spec.latent_size(request))
        return torch.randn(shape, generator=generator).to(self.device)

    def _velocities(
        self,
        requests: Sequence[VideoRequest],
        conditionings: Sequence[ZImageConditioning],
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        lead: Lead | None,
    ) -> list[Tensor]:
        """Of each request [1, C, F, H, W], guided."""
        rows = []
        for told, of_request, timestep in zip(conditionings, latents, timesteps, strict=True):
            time = float((1000 - timestep) / 1000)
            rows.append(Row(of_request[0], time, told.positive, told.places))
            if told.negative is not None:
                rows.append(Row(of_request[0], time, told.negative))
        f_patch_size = requests[0].f_patch_size
        if self.mesh.degree == 1 and rows[0].places is not None:
            outputs = [self._predict([row], f_patch_size, lead)[0] for row in rows]
        elif self.mesh.degree == 1:
            outputs = self._predict(rows, f_patch_size, lead)
        else:
            outputs = predict_each(
                self.mesh.guidance, rows, lambda row: self._predict([row], f_patch_size, lead)[0]
            )
        velocities = []
        for request, conditioning in zip(requests, conditionings, strict=True):
            velocity = outputs.pop(0)[None].float()
            if conditioning.negative is not None:
                negative = outputs.pop(0)[None].float()
                velocity = velocity + (request.guidance_scale - 1) * (velocity - negative)
            velocities.append(velocity)
        return velocities

    def _lead(
        self, request: VideoRequest, conditioning: ZImageConditioning, state: DenoiseState
    ) -> Lead | None:
        """What leads this step, if anything does."""
        control, pictures = request.control, conditioning.control
        if control is None or not control.acts_in(state.step, request.num_steps):
            return None
        if pictures is None:
            raise ValueError("what is to lead the video is not in its conditioning")
        net = self.controls[self.model.control_net(control.type).id]
        return partial(
            net.samples,
            control=pictures,
            scale=control.scale,
            f_patch_size=request.f_patch_size,
            patch_size=PATCH_SIZE,
        )

    def _predict(
        self, rows: Sequence[Row], f_patch_size: int, lead: Lead | None = None
    ) -> list[Tensor]:
        """The velocity [C, F, H, W] of each row; one whose text has places is alone."""
        latents = [row.latents.to(self.dtype) for row in rows]
        times = torch.tensor([row.time for row in rows], device=self.device)
        texts = [torch.tensor(row.text, dtype=self.dtype, device=self.device) for row in rows]
        samples = None if lead is None else lead(latents, times, texts)
        places = rows[0].places
        if places is not None:
            self.sharding.restriction = restrict(places, len(texts[0]), self.device)
        try:
            outputs: list[Tensor] = self.transformer(
                latents,
                times,
                texts,
                controlnet_block_samples=samples,
                patch_size=PATCH_SIZE,
                f_patch_size=f_patch_size,
                return_dict=False,
            )[0]
        finally:
            self.sharding.restriction = None
        return list(outputs)


class ZImageVideoDecoder:
    """Whatever the model's VAE, in temporal order."""

    def __init__(self, model: Model) -> None:
        self.vae = load_video_vae(model, "decoder")

    def decode(self, request: VideoRequest, latents: FloatArray) -> Iterator[Frames]:
        """Frames trimmed to the asked count and, from the middle, to the asked size."""
        yield from stream_frames(self.vae.decode(latents), request)

    def decode_tile(self, latents: FloatArray, box: Box) -> FloatArray:
        """A tile of the frames; TypeError from a VAE that has none, which `in_tiles` tells."""
        if not isinstance(self.vae, WanVae):
            raise TypeError(f"{type(self.vae).__name__} does not decode in tiles")
        return self.vae.decode_tile(latents, box)

    def decode_chunk(self, latents: FloatArray) -> FloatArray:
        """Frames of a run; TypeError from a VAE that has none, which `in_chunks` tells."""
        if not isinstance(self.vae, ImageVae):
            raise TypeError(f"{type(self.vae).__name__} does not decode in chunks")
        return self.vae.decode_chunk(latents)


def _has_places(request: VideoRequest) -> bool:
    """Its text has parts that are not for the whole video."""
    return bool(request.regions) or _varies_by_frame(request)


def _varies_by_frame(request: VideoRequest) -> bool:
    return request.seed_variance is not None and request.seed_variance.per_frame


def _hold_start_frame(latents: Tensor, conditioning: ZImageConditioning) -> Tensor:
    if conditioning.start_latents is None:
        return latents
    start = torch.tensor(conditioning.start_latents, device=latents.device)[None]
    return torch.cat([start, latents[:, :, 1:]], dim=2)
