"""A compute-bound step of each family, to be made by one rank or shared, and what that sends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from bench import shard_cases
from models.transformer_sharding import shard_hunyuan_video, shard_z_image
from models.unet_sharding import shard_frames
from parallel.frames import FrameGroupNorm, FrameHaloConv3d
from parallel.mesh import Mesh
from parallel.plan import all_to_all_bytes, ulysses_bytes
from parallel.sequence import SequenceSharding
from parallel.shard import Shard, split_sizes

GUIDANCE = 5.0
NUM_FRAMES = 16
TRANSFORMERS = ("z-image-video", "hunyuan-video")


@dataclass(frozen=True, slots=True)
class Step:
    """A step to be timed, for one text, and guided by two.

    part: what of a whole result this rank makes; formula_bytes: what it should send.
    """

    call: Callable[[], Tensor]
    guided: Callable[[], Tensor]
    use: Callable[[Mesh], None]
    part: Callable[[Tensor], Tensor]
    formula_bytes: float


def _guide(positive: Tensor, negative: Tensor) -> Tensor:
    return negative + GUIDANCE * (positive - negative)


def frame_step(case: shard_cases.FrameCase, mesh: Mesh) -> Step:
    """Both texts are one batch."""
    sharding = shard_frames(case.model)
    own = Shard(split_sizes(NUM_FRAMES, mesh.part.size), mesh.part.rank)
    here = [slice(0, NUM_FRAMES)]

    def use(mesh: Mesh) -> None:
        shard = sharding.use(mesh.part, NUM_FRAMES)
        here[0] = slice(shard.offset, shard.offset + shard.size)

    def part(whole: Tensor) -> Tensor:
        guided = whole.dim() < 5  # the batch is gone
        return own.cut(whole, case.frame_dim - guided)

    return Step(
        call=lambda: case.call(here[0]),
        guided=lambda: _guide(*case.call(here[0])),
        use=use,
        part=part,
        formula_bytes=_count_frame_bytes(case, own),
    )


def _count_frame_bytes(case: shard_cases.FrameCase, own: Shard) -> float:
    """The formulas, on the sizes that one rank's own run of the model shows."""
    activations: list[int] = []
    edges: list[int] = []
    moments: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, FrameHaloConv3d):
            edges.append(given[0][:, :, :1].nbytes)
        elif isinstance(module, FrameGroupNorm):
            moments.append(2 * len(given[0]) * module.num_groups * 4)
        else:
            activations.append(output.nbytes)

    hooks = []
    for module in case.model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            hooks.append(module.proj_in.register_forward_hook(count))
        elif isinstance(module, TemporalBasicTransformerBlock | FrameHaloConv3d | FrameGroupNorm):
            hooks.append(module.register_forward_hook(count))
    case.call(slice(0, NUM_FRAMES))
    for hook in hooks:
        hook.remove()
    ranks = len(own.sizes)
    neighbours = (own.rank > 0) + (own.rank < ranks - 1)
    there_and_back = all_to_all_bytes(sum(activations), NUM_FRAMES, own.size, ranks)
    return there_and_back + neighbours * sum(edges) + (ranks - 1) * sum(moments)


def _token_step(
    case: shard_cases.TokenCase,
    shard: Callable[[Any], SequenceSharding],
    attention_values: list[int],
    gathered_values: int,
    mesh: Mesh,
) -> Step:
    """attention_values: tokens times width of each attention; all in float32."""
    sharding = shard(case.model)
    ranks = mesh.part.size
    inside = sum(ulysses_bytes(4 * values, mesh.ulysses.size, ranks) for values in attention_values)
    return Step(
        call=lambda: case.call(0),
        guided=lambda: _guide(case.call(0), case.call(1)),
        use=lambda mesh: sharding.use(mesh.part, mesh.ulysses, mesh.ring),
        part=lambda whole: whole,
        formula_bytes=inside + 4 * gathered_values / ranks * (ranks - 1),
    )


def _z_image_step(mesh: Mesh) -> Step:
    heads, head_width, layers, frames, size = 16, 64, 1, 8, 52
    case = shard_cases.z_image(
        heads=heads, head_width=head_width, num_layers=layers, frames=frames, size=size
    )
    width = heads * head_width
    image = frames * (size // 2) ** 2 * width
    joint = image + 32 * width
    values = [image] * 2 + [joint] * layers
    return _token_step(case, shard_z_image, values, image + joint, mesh)


def _hunyuan_step(mesh: Mesh) -> Step:
    heads, axes, layers, frames, size, text = 16, (16, 24, 24), 1, 8, 16, 16
    case = shard_cases.hunyuan(
        heads=heads, rope_axes=axes, num_layers=layers, frames=frames, size=size, text=text
    )
    image = frames * size**2
    values = [(image + text) * heads * sum(axes)] * (2 * layers)
    return _token_step(case, shard_hunyuan_video, values, 4 * image, mesh)


STEPS: dict[str, Callable[[Mesh], Step]] = {
    "animatediff": lambda mesh: frame_step(
        shard_cases.animatediff(NUM_FRAMES, width=96, size=24), mesh
    ),
    "svd": lambda mesh: frame_step(shard_cases.svd(NUM_FRAMES, width=96, size=20), mesh),
    "z-image-video": _z_image_step,
    "hunyuan-video": _hunyuan_step,
}
