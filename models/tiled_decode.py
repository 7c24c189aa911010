"""diffusers' tiled VAE decode, taken apart: which tiles it decodes, and how it joins them.

Its loops run twice with the decoder replaced: once to learn the tiles, once to be handed what was
made of them. So the blending is diffusers' own and the result bit-equal, whoever decoded a tile,
on whatever machine, in whatever order. It serves VAEs that decode each tile in one call, without a
cache between calls: `AutoencoderKLHunyuanVideo`, `AutoencoderKL`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from parallel.process_group import ProcessGroup
from parallel.tiles import decode_shared


def find_tiles(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> list[Tensor]:
    """What the decoder is given for these latents [1, C, F, H, W], tile by tile.

    ValueError if tiling is off or the latents fit one tile.
    """
    tiles: list[Tensor] = []

    def record(tile: Tensor) -> Tensor:
        tiles.append(tile)
        return torch.empty(decoded_shape(vae, tile), device="meta")

    with _decoding_by(vae, record):
        vae.decode(latents)
    if len(tiles) < 2:
        raise ValueError(f"latents of shape {tuple(latents.shape)} are not decoded in tiles")
    return tiles


def join_tiles(
    vae: AutoencoderKLHunyuanVideo, latents: Tensor, decoded: Sequence[Tensor]
) -> Tensor:
    """The video [1, 3, F, H, W] in -1..1 from its decoded tiles, in `find_tiles`' order."""
    following = iter(decoded)
    with _decoding_by(vae, lambda _tile: next(following)):
        video: Tensor = vae.decode(latents).sample
    return video


def decoded_shape(vae: AutoencoderKLHunyuanVideo, tile: Tensor) -> tuple[int, ...]:
    """Of what the decoder makes of a tile [1, C, F, H, W]."""
    space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    batch, _, frames, height, width = tile.shape
    channels = vae.config.out_channels
    return (batch, channels, (frames - 1) * time + 1, height * space, width * space)


def decode_tiles_shared(
    vae: AutoencoderKLHunyuanVideo, latents: Tensor, group: ProcessGroup
) -> Tensor | None:
    """The tiled decode, each rank of the group taking its share; the video on rank 0 alone."""
    decoded = decode_shared(
        group, find_tiles(vae, latents), vae.decoder, lambda tile: decoded_shape(vae, tile)
    )
    return None if decoded is None else join_tiles(vae, latents, decoded)


class _Decoder(nn.Module):
    """A stand-in for the decoder."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, tile: Tensor, *_: Any) -> Tensor:
        return self.decode(tile)


@contextlib.contextmanager
def _decoding_by(
    vae: AutoencoderKLHunyuanVideo, decode: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    stock = vae.decoder
    vae.decoder = _Decoder(decode)
    try:
        yield
    finally:
        vae.decoder = stock
