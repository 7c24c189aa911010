"""diffusers' own pipelines over a checkpoint's folder: what ours is held against."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.animatediff.pipeline_animatediff import AnimateDiffPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    HunyuanVideoImageToVideoPipeline,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    StableVideoDiffusionPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    LlamaModel,
    LlavaForConditionalGeneration,
)


def animatediff(
    folder: Path, scheduler: Any = DDIMScheduler, pipeline: Any = AnimateDiffPipeline
) -> Any:
    """Or another of its pipelines, of the same parts."""
    return prepared(
        pipeline(
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            motion_adapter=MotionAdapter.from_pretrained(folder / "motion_adapter"),
            scheduler=scheduler.from_pretrained(folder / "scheduler"),
        )
    )


def svd(folder: Path) -> Any:
    """Of 14 or 25 frames."""
    return prepared(
        StableVideoDiffusionPipeline(
            vae=AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae"),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
            unet=UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet"),
            scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            feature_extractor=CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
        )
    )


def hunyuan_video(folder: Path, *, from_image: bool = False) -> Any:
    """Its VAE decodes in tiles, as its publishers advise."""
    parts = {
        "vae": AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        "text_encoder_2": CLIPTextModel.from_pretrained(folder / "text_encoder_2"),
        "transformer": HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }
    parts["vae"].enable_tiling()
    if not from_image:
        text_encoder = LlamaModel.from_pretrained(folder / "text_encoder")
        return prepared(HunyuanVideoPipeline(**parts, text_encoder=text_encoder))
    return prepared(
        HunyuanVideoImageToVideoPipeline(
            **parts,
            text_encoder=LlavaForConditionalGeneration.from_pretrained(folder / "text_encoder"),
            image_processor=CLIPImageProcessor.from_pretrained(folder / "image_processor"),
        )
    )


def prepared(pipeline: Any) -> Any:
    """Without a progress bar, and without gradients: torch rounds otherwise where parameters may
    want them, even if nothing asks.
    """
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    return pipeline
