"""What each family's publishers say that it makes: enough to price a video of it.

Sources: the AnimateDiff v2/v3 motion modules (32 positions, trained on 16 frames of 512x512),
Stable Video Diffusion's and HunyuanVideo's model cards, and this project's plan for Z-Image Video.
"""

from dataclasses import dataclass

from models.request import ModelFamily, Scheduler


@dataclass(frozen=True, slots=True)
class PublishedFamily:
    """What is made by default, and the most frames.

    frame_stride: temporal compression of the VAE (4k+1 frames where it is 4); size_multiple: what
    width and height are rounded up to before they are cut.
    """

    num_frames: int
    max_frames: int
    width: int
    height: int
    fps: int
    frame_stride: int
    size_multiple: int


SVD_FAMILIES = {ModelFamily.SVD, ModelFamily.SVD_XT}
# What a request may say that only some families understand. motion_strength, which the founding
# API gives every request, is told as without effect instead.
FIELDS_OF_FAMILIES: dict[str, set[ModelFamily]] = {
    "negative_prompt": set(ModelFamily) - SVD_FAMILIES,
    "flow_shift": {ModelFamily.Z_IMAGE_VIDEO, ModelFamily.HUNYUAN_VIDEO},
    "min_guidance_scale": SVD_FAMILIES,
    "motion_bucket_id": SVD_FAMILIES,
    "noise_aug_strength": SVD_FAMILIES,
    "true_cfg_scale": {ModelFamily.HUNYUAN_VIDEO},
    "denoising_start": {ModelFamily.Z_IMAGE_VIDEO},
    "denoising_end": {ModelFamily.Z_IMAGE_VIDEO},
    "mask": {ModelFamily.Z_IMAGE_VIDEO},
    "regions": {ModelFamily.Z_IMAGE_VIDEO},
    "seed_variance": {ModelFamily.Z_IMAGE_VIDEO},
    "free_noise": {ModelFamily.ANIMATEDIFF},
    "scheduler": {ModelFamily.ANIMATEDIFF, ModelFamily.Z_IMAGE_VIDEO},
}
SCHEDULERS = {
    ModelFamily.ANIMATEDIFF: (Scheduler.DDIM, Scheduler.EULER, Scheduler.LCM),
    ModelFamily.Z_IMAGE_VIDEO: (Scheduler.EULER, Scheduler.HEUN, Scheduler.LCM),
}
WITHOUT_PROMPT = SVD_FAMILIES
# Whose denoiser is a transformer's run of like blocks.
TRANSFORMERS = {ModelFamily.Z_IMAGE_VIDEO, ModelFamily.HUNYUAN_VIDEO}
# AnimateDiff's, with `free_noise`, if a manifest says nothing else.
MAX_FREE_NOISE_FRAMES = 128
LCM_STEPS = 50  # the schedule that LCM was distilled from has no more to choose from

PUBLISHED = {
    ModelFamily.ANIMATEDIFF: PublishedFamily(16, 32, 512, 512, 8, 1, 8),
    ModelFamily.SVD: PublishedFamily(14, 14, 1024, 576, 7, 1, 64),
    ModelFamily.SVD_XT: PublishedFamily(25, 25, 1024, 576, 7, 1, 64),
    ModelFamily.Z_IMAGE_VIDEO: PublishedFamily(16, 129, 1280, 720, 8, 4, 16),
    ModelFamily.HUNYUAN_VIDEO: PublishedFamily(129, 129, 1280, 720, 24, 4, 16),
}
