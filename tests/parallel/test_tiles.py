"""A decode in tiles, shared by ranks, is diffusers' own, bit for bit."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

from bench.ranks import run_ranks
from bench.shard_cases import randomised
from models.tiled_decode import decode_tiles_shared, find_tiles, join_tiles
from parallel.mesh import MeshBuilder
from parallel.plan import ParallelPlan

pytestmark = pytest.mark.parallel

SHAPE = (1, 4, 4, 6, 6)


def tiled_vae() -> AutoencoderKLHunyuanVideo:
    vae = randomised(
        AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        )
    )
    vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_min_num_frames=8,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
        tile_sample_stride_num_frames=4,
    )
    return vae


def some_latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def shared_equals_stock(rank: int, num_ranks: int) -> bool | None:
    vae, latents = tiled_vae(), some_latents()
    mesh = MeshBuilder(rank, num_ranks).mesh(
        ParallelPlan(frames=num_ranks), tuple(range(num_ranks))
    )
    video = decode_tiles_shared(vae, latents, mesh.part)
    return None if video is None else torch.equal(video, vae.decode(latents).sample)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_shared_tiled_decode_is_bit_equal_to_the_stock_one(num_ranks: int) -> None:
    assert run_ranks(num_ranks, shared_equals_stock, num_ranks) == [True] + [None] * (num_ranks - 1)


@torch.inference_mode()
def test_tiles_may_be_decoded_in_any_order_and_one_of_them_again() -> None:
    vae, latents = tiled_vae(), some_latents()
    stock = vae.decode(latents).sample
    tiles = find_tiles(vae, latents)
    assert len(tiles) > 4
    decoded = [vae.decoder(tile) for tile in reversed(tiles)][::-1]
    decoded[2] = vae.decoder(tiles[2])
    assert torch.equal(join_tiles(vae, latents, decoded), stock)
    other = next(i for i, tile in enumerate(tiles) if i and tile.shape == tiles[0].shape)
    decoded[0], decoded[other] = decoded[other], decoded[0]
    assert not torch.equal(join_tiles(vae, latents, decoded), stock), "the order must matter"


@torch.inference_mode()
def test_latents_of_one_tile_are_refused() -> None:
    vae = tiled_vae()
    with pytest.raises(ValueError, match="not decoded in tiles"):
        find_tiles(vae, some_latents()[:, :, :1, :2, :2])
