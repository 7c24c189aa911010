"""What a model's networks take of memory, found by running them without weights and without data.

torch's FakeTensorMode runs the very forward passes with tensors that have a shape and a type and
nothing else; what they make is counted for as long as it lives. Two sizes give the line that
`models.fit` goes by. On an H200, steps at full size took what is found so, within 4 %.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from models.catalog import ModelManifest
from models.fit import Affine, MemoryProfile, PartMemory
from models.request import ModelFamily
from models.spec import has_whole_motion_unet, read_json
from models.tiles import TILE_SIDE

# Latent frames, and latents of a side, of the two runs; the line goes through both.
FRAMES, SIDES = 8, (32, 64)
PATCH = 2  # of the transformers, in latents
RUN_FRAMES = 16  # that HunyuanVideo's VAE decodes at once, and the one before them


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of what is made within, and their most at once; `held` is not counted.

    torch's own MemTracker counts the same, but refuses modules that are called more than once, as
    decoders are, chunk by chunk and tile by tile.
    """

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()
        self.now = self.peak = 0
        for tensor in [*held.parameters(), *held.buffers()]:
            self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        size = self.seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True, slots=True)
class Network:
    """A denoiser's: how to build it from its configuration, and one pass of it.

    tokens: of a text; width and latents_per_token: as in MemoryProfile.
    """

    build: Callable[[], Any]
    run: Callable[[Any, int, int, torch.dtype, int], object]
    tokens: int = 0
    width: int = 0
    latents_per_token: int = 1

    def units(self, frames: int, side: int) -> int:
        """Of one text and so many latents."""
        return frames * side**2 // self.latents_per_token + self.tokens


def profile_memory(folder: Path, manifest: ModelManifest) -> MemoryProfile:
    """Of a checkpoint's folder; its configuration files are enough."""
    network = _network(folder, manifest)
    vae = folder / "vae"
    config = read_json(vae / "config.json")
    name = config["_class_name"]
    decoder, decode = DECODERS[name]
    chunk, tile = manifest.decode_chunk_frames, None
    if name == "AutoencoderKLWan":
        chunk, tile = 1, TILE_SIDE // config["scale_factor_spatial"]
    if name == "AutoencoderKLHunyuanVideo":
        chunk = RUN_FRAMES // config["temporal_compression_ratio"] + 1
        tile = TILE_SIDE // config["spatial_compression_ratio"]
    return MemoryProfile(
        batches_texts=manifest.family is not ModelFamily.HUNYUAN_VIDEO,
        denoiser=_measure(
            network.build,
            lambda built, side, dtype: network.run(built, FRAMES, side, dtype, network.tokens),
            lambda side: network.units(FRAMES, side),
        ),
        decoder=_measure(
            lambda: _build_decoder(decoder, vae),
            lambda built, side, dtype: decode(built, chunk, side, dtype),
            lambda side: side * side,
        ),
        latent_channels=config.get("latent_channels") or config["z_dim"],
        latents_per_token=network.latents_per_token,
        width=network.width,
        chunk_frames=chunk,
        tile=tile,
        always_tiled=name == "AutoencoderKLHunyuanVideo",
    )


def _network(folder: Path, manifest: ModelManifest) -> Network:
    transformer, unet = folder / "transformer", folder / "unet"
    match manifest.family:
        case ModelFamily.ANIMATEDIFF:
            return Network(lambda: _build_motion_unet(folder), _run_motion_unet)
        case ModelFamily.SVD | ModelFamily.SVD_XT:
            return Network(lambda: _build(UNetSpatioTemporalConditionModel, unet), _run_svd_unet)
    config, tokens = read_json(transformer / "config.json"), manifest.max_text_tokens
    if manifest.family is ModelFamily.Z_IMAGE_VIDEO:
        kind, run, width, patch = ZImageTransformer2DModel, _run_z_image, config["dim"], PATCH**2
    else:
        kind, run = HunyuanVideoTransformer3DModel, _run_hunyuan
        width = config["num_attention_heads"] * config["attention_head_dim"]
        patch = config["patch_size_t"] * config["patch_size"] ** 2
    return Network(lambda: _build(kind, transformer), run, tokens, width, patch)


def _measure(
    build: Callable[[], Any],
    run: Callable[[Any, int, torch.dtype], object],
    units: Callable[[int], int],
) -> PartMemory:
    """run: of latents of that side; units: of them."""
    lines = {}
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), _default(dtype):
            network = build().eval()
            less, more = (
                peak_bytes(network, functools.partial(run, network, side, dtype)) for side in SIDES
            )
        few, many = map(units, SIDES)
        per_unit = (more - less) / (many - few)
        lines[dtype] = Affine(base=max(0.0, less - per_unit * few), per_unit=per_unit)
    layers = [layer for layer in network.modules() if not list(layer.children())]
    runs = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    blocks = [block for run_of_blocks in runs for block in run_of_blocks] or [network]
    return PartMemory(
        parameters=_count(network),
        rounded=_count_rounded(build),
        fixed=_count(network) - sum(map(_count, runs)),
        largest_layer=max(map(_count, layers)),
        largest_block=max(map(_count, blocks)),
        two_bytes=lines[torch.bfloat16],
        four_bytes=lines[torch.float32],
    )


def peak_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """The most that lived at once while it ran, but for the network's weights."""
    counter = PeakBytes(network)
    with counter:
        run()
    return counter.peak


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Of parameters: fake ones can't be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _build(component: Any, folder: Path) -> Any:
    return component.from_config(component.load_config(folder, local_files_only=True))


def _build_motion_unet(folder: Path) -> Any:
    if has_whole_motion_unet(folder):
        return _build(UNetMotionModel, folder / "unet")
    unet = _build(UNet2DConditionModel, folder / "unet")
    adapter = _build(MotionAdapter, folder / "motion_adapter")
    adapter.to = lambda **_: adapter  # it would be moved to where it is, which fakes can't be
    return UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)


def _run_z_image(network: Any, frames: int, side: int, dtype: torch.dtype, tokens: int) -> object:
    config = network.config
    latents = torch.empty(config.in_channels, frames, side, side, dtype=dtype)
    text = torch.empty(tokens, config.cap_feat_dim, dtype=dtype)
    sizes = {"patch_size": PATCH, "f_patch_size": config.all_f_patch_size[0]}
    return network([latents], torch.tensor([0.5]), [text], **sizes, return_dict=False)


def _run_hunyuan(network: Any, frames: int, side: int, dtype: torch.dtype, tokens: int) -> object:
    config = network.config
    guidance = torch.tensor([6000.0], dtype=dtype) if config.guidance_embeds else None
    return network(
        torch.empty(1, config.in_channels, frames, side, side, dtype=dtype),
        torch.tensor([500]),
        torch.empty(1, tokens, config.text_embed_dim, dtype=dtype),
        torch.ones(1, tokens, dtype=torch.int64),
        torch.empty(1, config.pooled_projection_dim, dtype=dtype),
        guidance,
        return_dict=False,
    )


def _run_motion_unet(
    network: Any, frames: int, side: int, dtype: torch.dtype, _tokens: int
) -> object:
    config = network.config
    return network(
        torch.empty(1, config.in_channels, frames, side, side, dtype=dtype),
        torch.tensor(500),
        torch.empty(frames, 77, config.cross_attention_dim, dtype=dtype),
        return_dict=False,
    )


def _run_svd_unet(network: Any, frames: int, side: int, dtype: torch.dtype, _tokens: int) -> object:
    config = network.config
    return network(
        torch.empty(1, frames, config.in_channels, side, side, dtype=dtype),
        torch.tensor(0.5),
        torch.empty(1, 1, config.cross_attention_dim, dtype=dtype),
        torch.empty(1, 3, dtype=dtype),
        return_dict=False,
    )


def _build_decoder(component: Any, folder: Path) -> Any:
    vae = _build(component, folder)
    vae.encoder = None
    return vae


def _decode_wan(vae: Any, _chunk: int, side: int, dtype: torch.dtype) -> object:
    """As `models.video_vae` does, a latent frame after the other; the third has all there is."""
    cache: list[Tensor | None] = [None] * vae._cached_conv_counts["decoder"]
    for index in range(3):
        latents = torch.empty(1, vae.config.z_dim, 1, side, side, dtype=dtype)
        vae.decoder(latents, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
    return cache


def _decode_images(vae: Any, chunk: int, side: int, dtype: torch.dtype) -> object:
    return vae.decode(torch.empty(chunk, vae.config.latent_channels, side, side, dtype=dtype))


def _decode_temporal(vae: Any, chunk: int, side: int, dtype: torch.dtype) -> object:
    latents = torch.empty(chunk, vae.config.latent_channels, side, side, dtype=dtype)
    return vae.decode(latents, num_frames=chunk)


def _decode_hunyuan(vae: Any, chunk: int, side: int, dtype: torch.dtype) -> object:
    """Two runs of frames in tiles, as `models.hunyuan_video` does: one waits for the other."""
    vae.enable_tiling()
    latents = torch.empty(1, vae.config.latent_channels, chunk, side, side, dtype=dtype)
    before = vae.tiled_decode(latents).sample
    return before, vae.tiled_decode(latents).sample


# The class, and one run of it.
DECODERS: dict[str, tuple[Any, Callable[[Any, int, int, torch.dtype], object]]] = {
    "AutoencoderKLWan": (AutoencoderKLWan, _decode_wan),
    "AutoencoderKL": (AutoencoderKL, _decode_images),
    "AutoencoderKLTemporalDecoder": (AutoencoderKLTemporalDecoder, _decode_temporal),
    "AutoencoderKLHunyuanVideo": (AutoencoderKLHunyuanVideo, _decode_hunyuan),
}


def _count_rounded(build: Callable[[], Any]) -> int:
    """The weights that diffusers would store in eight bits: it leaves out what is sensitive."""
    with torch.device("meta"):
        network = build().to("meta")
        network.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    weights = network.parameters()
    return sum(weight.numel() for weight in weights if weight.dtype is torch.float8_e4m3fn)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
