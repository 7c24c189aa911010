"""Writes tiny randomly initialised checkpoints of the published families: the real classes in
diffusers' layout, no skill. They are made as small as the classes allow.
"""

import json
from collections.abc import Callable
from functools import partial
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
from diffusers.pipelines.hunyuan_video import (
    pipeline_hunyuan_video,
    pipeline_hunyuan_video_image2video,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = [
    "<|begin|>",
    "<|end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
]
NUM_WORDS = 1200
MANIFEST: dict[str, Any] = {
    "trained": False,
    "licence": "Apache-2.0",
    "max_text_tokens": 77,
    "min_frames": 1,
    "max_side": 512,
    "max_area": 262144,
}


def write_random_animatediff(folder: Path, *, width: int = 8, seed: int = 0) -> None:
    """Stable Diffusion's parts and a motion adapter beside them."""
    torch.manual_seed(seed)
    tokenizer = _make_tokenizer(model_max_length=77)
    _save(folder, "tokenizer", tokenizer)
    _save(folder, "text_encoder", _make_clip_text(len(tokenizer), tokenizer))
    unet = UNet2DConditionModel(
        block_out_channels=(width, width),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    adapter = MotionAdapter(
        block_out_channels=(width, width),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    _save(folder, "unet", unet)
    _save(folder, "motion_adapter", _with_effect(adapter))
    _save(folder, "vae", AutoencoderKL(**_image_vae(8), norm_num_groups=2))
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        timestep_spacing="linspace",
    )
    _save(folder, "scheduler", scheduler)
    defaults = {"num_frames": 8, "fps": 8, "num_steps": 2, "guidance_scale": 7.5}
    _write_manifest(
        folder, "animatediff", vae="kl", max_frames=32, decode_chunk_frames=4, defaults=defaults
    )


def write_random_svd(folder: Path, *, num_frames: int = 14, width: int = 32, seed: int = 0) -> None:
    """svd, or svd-xt if it is of 25 frames; width: a multiple of 32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        intermediate_size=37,
        patch_size=32,
    )
    _save(folder, "image_encoder", CLIPVisionModelWithProjection(vision))
    _save(folder, "feature_extractor", CLIPImageProcessor(size=224, crop_size=224))
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        num_frames=num_frames,
    )
    _save(folder, "unet", unet)
    shape = _image_vae(32)
    del shape["up_block_types"]
    _save(folder, "vae", AutoencoderKLTemporalDecoder(**shape))
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=True,
        timestep_type="continuous",
        timestep_spacing="leading",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
    )
    _save(folder, "scheduler", scheduler)
    defaults = {
        "num_frames": num_frames,
        "fps": 7,
        "num_steps": 2,
        "guidance_scale": 3.0,
        "min_guidance_scale": 1.0,
        "motion_bucket_id": 127,
        "noise_aug_strength": 0.02,
    }
    _write_manifest(
        folder,
        "svd" if num_frames < 25 else "svd-xt",
        vae="kl-temporal",
        max_frames=num_frames,
        decode_chunk_frames=5,
        defaults=defaults,
    )


def write_random_hunyuan_video(
    folder: Path,
    *,
    image_condition: str | None = None,
    num_heads: int = 2,
    num_layers: int = 1,
    seed: int = 0,
) -> None:
    """image_condition: None for text-to-video, or "latent_concat" or "token_replace"."""
    torch.manual_seed(seed)
    channels = 4
    tokenizer = _make_tokenizer(model_max_length=4096)
    _save(folder, "tokenizer", tokenizer)
    _save(folder, "tokenizer_2", _make_tokenizer(model_max_length=77))
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if image_condition is None:
        _save(folder, "text_encoder", LlamaModel(llama))
    else:
        _save(folder, "text_encoder", _make_llava(llama, tokenizer))
        _save(folder, "image_processor", CLIPImageProcessor(size=336, crop_size=336))
    _save(folder, "text_encoder_2", _make_clip_text(len(tokenizer), tokenizer))
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=2 * channels + 1 if image_condition == "latent_concat" else channels,
        out_channels=channels,
        num_attention_heads=num_heads,
        attention_head_dim=16,
        num_layers=num_layers,
        num_single_layers=num_layers,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=image_condition != "latent_concat",
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition,
    )
    _save(folder, "transformer", transformer)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    _save(folder, "vae", vae)
    _save(folder, "scheduler", FlowMatchEulerDiscreteScheduler(shift=7.0))
    defaults = {"num_frames": 9, "fps": 24, "num_steps": 2, "guidance_scale": 6.0}
    _write_manifest(
        folder,
        "hunyuan-video",
        vae="hunyuan",
        max_frames=129,
        max_text_tokens=256,
        defaults=defaults,
    )


def write_random_lora(path: Path, seed: int = 0) -> None:
    """For the random `animatediff`: all queries of its first motion module and attention."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in ("attentions", "motion_modules"):
        name = f"unet.down_blocks.0.{block}.0.transformer_blocks.0.attn1.to_q"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 8, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(8, 4, generator=generator)
    save_file(tensors, path)


RANDOM_FAMILIES: dict[str, Callable[[Path], None]] = {
    "animatediff": write_random_animatediff,
    "svd": write_random_svd,
    "svd-xt": partial(write_random_svd, num_frames=25),
    "hunyuan-video": write_random_hunyuan_video,
    "hunyuan-video-concat": partial(write_random_hunyuan_video, image_condition="latent_concat"),
    "hunyuan-video-replace": partial(write_random_hunyuan_video, image_condition="token_replace"),
}


def _image_vae(width: int) -> dict[str, Any]:
    """Eight times smaller in space, 4 latent channels."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (width,) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 64,
    }


def _make_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from HunyuanVideo's templates, which it cuts at fixed places."""
    templates = [
        pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"],
        pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE["template"],
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    for token in SPECIAL_TOKENS:
        templates = [template.replace(token, "\0") for template in templates]
    pieces = [piece for template in templates for piece in template.split("\0") if piece]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(8 * pieces, trainer)
    begin, end = SPECIAL_TOKENS[:2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}" if model_max_length == 77 else f"{begin} $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        padding_side="right",
        model_max_length=model_max_length,
    )


def _make_clip_text(vocabulary_size: int, tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _make_llava(
    llama: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """Its image has 24 x 24 patches, as many as HunyuanVideo's template has room for."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        intermediate_size=32,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _with_effect(adapter: MotionAdapter) -> MotionAdapter:
    """A motion adapter begins without effect: its last layers are zero."""
    with torch.no_grad():
        for module in adapter.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return adapter


def _save(folder: Path, component: str, part: Any) -> None:
    """Large parts as safetensors, which is what both libraries write by default."""
    save: Callable[..., Any] = part.save_pretrained
    save(folder / component)


def _write_manifest(folder: Path, family: str, **entries: Any) -> None:
    content = {
        "family": family,
        "description": f"Random {family}, for tests",
        **MANIFEST,
        **entries,
        "defaults": {"width": 64, "height": 64, **entries["defaults"]},
    }
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")
