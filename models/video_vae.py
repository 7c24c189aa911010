"""The VAEs that a Z-Image video model may have: Wan's causal one, or an image model's, by frame."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from torch import Tensor

from models.catalog import Model
from models.conditioning import FloatArray
from models.spec import has_image_vae
from models.tiles import Box
from models.weights import choose_device, choose_dtype, load_component

Half = Literal["encoder", "decoder"]


class VideoVae(Protocol):
    """Between frames and the latents that the transformer sees, which are normalised."""

    def encode(self, pixels: FloatArray) -> FloatArray:
        """[3, F, H, W] about -1..1 -> the mode of the posterior, [C, f, h, w]."""
        ...

    def decode(self, latents: FloatArray) -> Iterator[FloatArray]:
        """[1, C, f, h, w] -> runs of frames [3, F, H, W] about -1..1, in temporal order."""
        ...


def load_video_vae(model: Model, half: Half) -> VideoVae:
    """One half of the VAE, of the class that its configuration names."""
    return (ImageVae if has_image_vae(model.folder) else WanVae)(model, half)


def _load(kind: Any, model: Model, half: Half) -> Any:
    device = choose_device()
    vae = load_component(kind, model.folder / "vae", choose_dtype(device, model.compute), device)
    setattr(vae, "decoder" if half == "encoder" else "encoder", None)
    return vae


class WanVae:
    """`AutoencoderKLWan`: a latent frame for the first frame and for every four after it.

    Decodes one latent frame at a time through its feature cache, bit-equal to its own `decode`,
    whose loop this is; the cache is the call's own, so that calls may overlap.
    """

    def __init__(self, model: Model, half: Half) -> None:
        self.vae = _load(AutoencoderKLWan, model, half)

    @torch.inference_mode()
    def encode(self, pixels: FloatArray) -> FloatArray:
        """[3, F, H, W] -> [C, (F-1)/4+1, H/8, W/8]."""
        video = torch.from_numpy(pixels)[None].to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(video).latent_dist.mode().float()
        mean, deviation = self._statistics()
        normalised: FloatArray = ((latents - mean) / deviation)[0].cpu().numpy()
        return normalised

    @torch.inference_mode()
    def decode(self, latents: FloatArray) -> Iterator[FloatArray]:
        """1 frame, then 4 at a time."""
        patch = self.vae.config.patch_size
        for chunk in self._decode_chunks(self.vae.post_quant_conv(self._scale(latents))):
            frames = chunk if patch is None else unpatchify(chunk, patch)
            yield frames[0].float().cpu().numpy()

    @torch.inference_mode()
    def decode_tile(self, latents: FloatArray, box: Box) -> FloatArray:
        """A tile of `AutoencoderKLWan.tiled_decode` before it is blended, [C, F, h, w]."""
        scaled = self._scale(latents)[
            :, :, :, box.top : box.top + box.height, box.left : box.left + box.width
        ]
        frames = [self.vae.post_quant_conv(frame) for frame in scaled.split(1, dim=2)]
        decoded = torch.cat(list(self._decode_chunks(torch.cat(frames, dim=2))), dim=2)
        pixels: FloatArray = decoded[0].float().cpu().numpy()
        return pixels

    def _scale(self, latents: FloatArray) -> Tensor:
        mean, deviation = self._statistics()
        scaled = torch.tensor(latents, device=self.vae.device) * deviation + mean
        return scaled.to(self.vae.dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, [1, C, 1, 1, 1]."""
        shape = (1, -1, 1, 1, 1)
        return (
            torch.tensor(self.vae.config.latents_mean, device=self.vae.device).view(shape),
            torch.tensor(self.vae.config.latents_std, device=self.vae.device).view(shape),
        )

    def _decode_chunks(self, hidden: Tensor) -> Iterator[Tensor]:
        """[1, 3, 1 or 4, H, W] of each latent frame."""
        cache: list[Tensor | None] = [None] * self.vae._cached_conv_counts["decoder"]
        for index in range(hidden.shape[2]):
            yield self.vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=cache,
                feat_idx=[0],
                first_chunk=index == 0,
            )


class ImageVae:
    """`AutoencoderKL`, as Z-Image's image model has it: a latent frame for every frame."""

    def __init__(self, model: Model, half: Half) -> None:
        self.vae = _load(AutoencoderKL, model, half)
        self.chunk = model.manifest.decode_chunk_frames

    @torch.inference_mode()
    def encode(self, pixels: FloatArray) -> FloatArray:
        """[3, F, H, W] -> [C, F, H/8, W/8]."""
        frames = torch.from_numpy(pixels).transpose(0, 1).to(self.vae.device, self.vae.dtype)
        modes = [self.vae.encode(c).latent_dist.mode().float() for c in frames.split(self.chunk)]
        config = self.vae.config
        latents = (torch.cat(modes) - (config.shift_factor or 0.0)) * config.scaling_factor
        normalised: FloatArray = latents.transpose(0, 1).cpu().numpy()
        return normalised

    def decode(self, latents: FloatArray) -> Iterator[FloatArray]:
        """decode_chunk_frames at a time."""
        for start in range(0, latents.shape[2], self.chunk):
            yield self.decode_chunk(latents[:, :, start : start + self.chunk])

    @torch.inference_mode()
    def decode_chunk(self, latents: FloatArray) -> FloatArray:
        """[1, C, F, h, w] -> [3, F, H, W]"""
        config = self.vae.config
        frames = torch.tensor(latents[0], device=self.vae.device).transpose(0, 1)
        frames = (frames / config.scaling_factor + (config.shift_factor or 0.0)).to(self.vae.dtype)
        decoded = self.vae.decode(frames).sample
        pixels: FloatArray = decoded.transpose(0, 1).float().cpu().numpy()
        return pixels
