"""What a denoise step costs, by family and size: torch-free, for whoever plans without a GPU.

UNets: counted at SVD-XT's 25 x 576 x 1024 and AnimateDiff's 16 x 512 x 512, both of two texts, and
taken to grow with frames and area. Transformers: 4 L N^2 D for attention, and so many operations a
token for the rest. The tests count all of it again, on the real classes on the meta device.
"""

from typing import NamedTuple, Self

from models.request import ModelFamily, VideoRequest
from models.spec import FamilySpec
from parallel.plan import FrameShape, StepShape, TokenShape

BYTES = 2  # fp16 or bf16
# With AnimateDiff's v3 motion adapter; counted on the meta device.
UNET_PARAMETERS = {
    ModelFamily.ANIMATEDIFF: 1_276_600_000,
    ModelFamily.SVD: 1_524_600_000,
    ModelFamily.SVD_XT: 1_524_600_000,
}
# HunyuanVideo's VAE takes about 100 s on an A100 for 129 frames of 1280 x 720, of some 50 minutes.
DECODE_S_PER_PIXEL = 100 / (129 * 1280 * 720)
TEXT_TOKENS = {ModelFamily.Z_IMAGE_VIDEO: 512, ModelFamily.HUNYUAN_VIDEO: 256}


class VideoShape(NamedTuple):
    """All of a request that its time depends on, but for its steps' number; of one family."""

    num_frames: int
    width: int
    height: int
    f_patch_size: int
    guided: bool

    @classmethod
    def of(cls, request: VideoRequest) -> Self:
        """A request's."""
        size = (request.num_frames, request.width, request.height)
        return cls(*size, request.f_patch_size, request.guided)

    @classmethod
    def parse(cls, text: str) -> Self:
        """What __str__ made."""
        num_frames, width, height, f_patch_size, guided = text.split("x")
        size = (int(num_frames), int(width), int(height))
        return cls(*size, int(f_patch_size), guided == "guided")

    def __str__(self) -> str:
        return "x".join([*map(str, self[:4]), "guided" if self.guided else "alone"])

    def step(self, family: ModelFamily, spec: FamilySpec) -> StepShape:
        """What one step works on, at the size that is generated."""
        width, height = spec.generated_size(self.width, self.height)
        frames = spec.generated_frames(self.num_frames, self.f_patch_size)
        shape = (family, frames, width, height)
        return denoise_shape(*shape, f_patch_size=self.f_patch_size, guided=self.guided)


def denoise_shape(
    family: ModelFamily,
    num_frames: int,
    width: int,
    height: int,
    *,
    f_patch_size: int = 1,
    guided: bool = True,
) -> StepShape:
    """The shape of one step at full size; num_frames is what the family generates."""
    num_texts = 2 if guided else 1
    if family is ModelFamily.ANIMATEDIFF:
        scale = num_frames * width * height / (16 * 512 * 512) * num_texts / 2
        return FrameShape(
            num_texts=num_texts,
            num_frames=num_frames,
            flops=35.5e12 * scale,
            temporal_bytes=765e6 * scale,
            halo_bytes=0.0,
            num_collectives=63,
            latent_bytes=_latent_bytes(4, num_frames, width, height),
        )
    if family in (ModelFamily.SVD, ModelFamily.SVD_XT):
        area = width * height / (1024 * 576) * num_texts / 2
        scale = num_frames / 25 * area
        return FrameShape(
            num_texts=num_texts,
            num_frames=num_frames,
            flops=159.9e12 * scale,
            temporal_bytes=2.60e9 * scale,
            halo_bytes=217e6 * area,
            num_collectives=120,
            latent_bytes=_latent_bytes(4, num_frames, width, height),
        )
    latent_frames = (num_frames - 1) // 4 + 1
    # what patches of 2 by 2 latent pixels, 8 pixels each, come to
    tokens = -(-latent_frames // f_patch_size) * (width // 16) * (height // 16)
    tokens += TEXT_TOKENS[family]
    if family is ModelFamily.Z_IMAGE_VIDEO:
        heads, layers, model_width, linear_flops = 30, 32, 3840, 1.13e10
    else:
        heads, layers, model_width, linear_flops = 24, 60, 3072, 1.36e10
    return TokenShape(
        num_texts=num_texts,
        num_tokens=tokens,
        num_heads=heads,
        num_layers=layers,
        linear_flops=num_texts * linear_flops * tokens,
        attention_flops=num_texts * 4.0 * layers * tokens**2 * model_width,
        activation_bytes=float(tokens * model_width * BYTES),
        latent_bytes=_latent_bytes(16, latent_frames, width, height),
    )


def _latent_bytes(channels: int, frames: int, width: int, height: int) -> float:
    """float32, as latents are kept between steps."""
    return 4.0 * channels * frames * (width // 8) * (height // 8)
