"""Trains a `ZImageControlNetModel` that leads the demo model by outlines; the model stays as is."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from training.attention import use_fusible_attention
from training.captions import colour_alone, paraphrase
from training.clips import draw_clip
from training.encoding import encode_drawn, normalise
from training.loop import MovingAverage, run_steps
from training.optimizers import MuonAndAdam, rate_at
from training.train_denoiser import (
    BATCH_SIZES,
    CAPTION_DROPOUT,
    DETAIL_SHIFT,
    F_PATCH_SHARES,
    FINISH_FIRST_FRAME_WEIGHT,
    FIRST_FRAME_WEIGHT,
    LatentClips,
    encode_captions,
    flow_matching_loss,
)

NUM_STEPS = 2600
NUM_CLIPS = 1496
# Where the caption tells of the colour alone, only the outlines tell of shape and motion.
COLOUR_ALONE_SHARE = 0.6
GAPS_SHARE = 0.03
BINOMIAL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16


def make_control(transformer: ZImageTransformer2DModel) -> ZImageControlNetModel:
    """One layer, that refines with the noise and then leads the transformer's first; the "lite"
    layout of Z-Image-Turbo-Fun-Controlnet-Union. It has no effect yet.
    """
    config = transformer.config
    return ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=config.in_channels,
        add_control_noise_refiner="control_layers",
        all_patch_size=config.all_patch_size,
        all_f_patch_size=config.all_f_patch_size,
        dim=config.dim,
        n_refiner_layers=config.n_refiner_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
    )


def encode_outlines(
    vae: AutoencoderKLWan, clips: LatentClips, seed: int, saved_at: Path, num_clips: int = NUM_CLIPS
) -> Tensor:
    """Normalised latents [N, C, F, H, W] of the outlines of the first clips, which are drawn again
    as `encode_clips` drew them.
    """
    random_numbers = np.random.default_rng(seed)
    chance = random.Random(f"outlines-{seed}")

    def draw(number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        told = clips.combinations[number], clips.backgrounds[number]
        alpha = draw_clip(*told, random_numbers).alpha
        return outline(alpha, chance), alpha

    count = min(num_clips, len(clips.combinations))
    latents, coverage = encode_drawn(vae, draw, count, saved_at, of="outlines")
    if not torch.equal(coverage, clips.coverage[:count]):
        raise ValueError(f"{saved_at}: the outlines are of other clips")
    return normalise(vae, latents)


def outline(alpha: NDArray[np.float32], chance: random.Random) -> NDArray[np.uint8]:
    """A shape's rim in white on black, uint8 [F, H, W, 3], a pixel wide, of coverage [F, H, W].

    Detectors smooth before they look, so that corners are round; they put the rim's pixels inside
    or outside, and some leave gaps. So does this, each time in another way.
    """
    smooth = torch.from_numpy(alpha)[:, None]
    for _ in range(chance.randint(0, 4)):
        smooth = functional.conv2d(smooth, BINOMIAL, padding=1)
    level = chance.uniform(0.3, 0.7)
    inside = np.pad(smooth[:, 0].numpy() > level, ((0, 0), (1, 1), (1, 1)))
    around = (inside[:, :-2, 1:-1], inside[:, 2:, 1:-1], inside[:, 1:-1, :-2], inside[:, 1:-1, 2:])
    middle = inside[:, 1:-1, 1:-1]
    if chance.random() < 0.5:
        rim = middle & ~np.logical_and.reduce(around)
    else:
        rim = ~middle & np.logical_or.reduce(around)
    gaps = np.random.default_rng(chance.getrandbits(48)).random(rim.shape) < GAPS_SHARE
    white = np.where(rim & ~gaps, 255, 0).astype(np.uint8)
    return np.repeat(white[..., None], 3, axis=3)


def train_control(
    clips: LatentClips,
    outlines: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
    work: Path,
    seed: int,
    num_steps: int = NUM_STEPS,
) -> ZImageControlNetModel:
    """Train the control network alone; it returns with its averaged weights."""
    torch.manual_seed(seed)
    control = make_control(transformer)
    own: dict[str, torch.nn.Module] = {
        "control_layers": control.control_layers.train(),
        "control_all_x_embedder": control.control_all_x_embedder.train(),
    }
    optimizers = MuonAndAdam(own.values())
    average = MovingAverage(own, decay=0.995)
    for module in (transformer, text_encoder):
        module.requires_grad_(False).eval()
    ZImageControlNetModel.from_transformer(control, transformer)
    control.gradient_checkpointing = False  # which upstream asks for and does not set
    # Upstream writes them among tokens that autocast has made.
    for name in ("x_pad_token", "cap_pad_token"):
        padding = getattr(transformer, name).detach().bfloat16()
        setattr(control, name, torch.nn.Parameter(padding, requires_grad=False))
    use_fusible_attention(transformer)
    use_fusible_attention(control)

    def train_step(step: int) -> dict[str, float]:
        chance = random.Random(f"control-{seed}-{step}")
        torch.manual_seed(chance.getrandbits(48))
        late = step > 0.6 * num_steps
        f_patch_size = chance.choices(list(F_PATCH_SHARES), list(F_PATCH_SHARES.values()))[0]
        rows = chance.choices(range(len(outlines)), k=BATCH_SIZES[f_patch_size])
        captions = [_caption(clips, row, chance) for row in rows]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                texts = encode_captions(tokenizer, text_encoder, captions)
            loss = flow_matching_loss(
                partial(predict_led, control, transformer, list(outlines[rows].unbind()), texts),
                clips.latents[rows],
                clips.coverage[rows],
                f_patch_size=f_patch_size,
                sigma_shift=DETAIL_SHIFT,
                first_frame_weight=FINISH_FIRST_FRAME_WEIGHT if late else FIRST_FRAME_WEIGHT,
            )
            optimizers.back(loss)
        optimizers.step(rate_at(step, num_steps))
        average.update()
        return {f"loss_f{f_patch_size}": loss.item()}

    run_steps(
        "control",
        num_steps,
        {**own, **optimizers.parts, "average": average},
        train_step,
        work / "control.pt",
    )
    average.copy_to_modules()
    alone = make_control(transformer)
    for name, module in own.items():
        getattr(alone, name).load_state_dict(module.state_dict())
    return alone.eval()


def predict_led(
    control: ZImageControlNetModel,
    transformer: ZImageTransformer2DModel,
    outlines: list[Tensor],
    texts: list[Tensor],
    latents: list[Tensor],
    times: Tensor,
    f_patch_size: int,
) -> list[Tensor]:
    """The velocities [C, F, H, W] of latents, each led by its outlines [C, F, H, W]."""
    samples = control(latents, times, texts, outlines, patch_size=2, f_patch_size=f_patch_size)
    made: list[Tensor] = transformer(
        latents,
        times,
        texts,
        controlnet_block_samples=samples,
        patch_size=2,
        f_patch_size=f_patch_size,
        return_dict=False,
    )[0]
    return made


def _caption(clips: LatentClips, row: int, chance: random.Random) -> str:
    if chance.random() < CAPTION_DROPOUT:
        return ""
    if chance.random() < COLOUR_ALONE_SHARE:
        return colour_alone(clips.combinations[row], chance)
    return paraphrase(clips.combinations[row], clips.backgrounds[row], chance)
