"""`python -m training.additions` makes what lies beside the demo model: control and a LoRA.

The model itself stays as it is; an interrupted run goes on.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from models.catalog import add_to_manifest
from models.weight_files import check_sums
from models.weights import load_component
from training.train_control import encode_outlines, train_control
from training.train_denoiser import encode_clips
from training.train_regions import encode_halves, train_regions

CLIPS_PER_CAPTION = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a finished checkpoint, in float32."""

    vae: AutoencoderKLWan
    tokenizer: PreTrainedTokenizerFast
    text_encoder: Qwen3Model
    transformer: ZImageTransformer2DModel


def load_parts(folder: Path) -> Parts:
    """WeightsMissing, WeightsDamaged."""
    vae, text_encoder, transformer = (
        load_component(kind, folder / name, torch.float32, torch.device("cpu"))
        for kind, name in (
            (AutoencoderKLWan, "vae"),
            (Qwen3Model, "text_encoder"),
            (ZImageTransformer2DModel, "transformer"),
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return Parts(vae, tokenizer, text_encoder, transformer)


def main() -> None:
    """Train both, and list them in the manifest; prints how long it took."""
    parser = argparse.ArgumentParser(prog="python -m training.additions", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--work", type=Path, help="default: out/training/additions-N")
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    folder, seed = arguments.model, arguments.seed
    work: Path = arguments.work or Path(f"out/training/additions-{seed}")
    work.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    parts = load_parts(folder)
    texts = (parts.tokenizer, parts.text_encoder)
    clips = encode_clips(parts.vae, seed, work / "clips.pt", CLIPS_PER_CAPTION, is_trained=True)
    outlines = encode_outlines(parts.vae, clips, seed, work / "outlines.pt")
    control = train_control(clips, outlines, *texts, parts.transformer, work, seed)
    save_control(folder, control)
    halves = encode_halves(parts.vae, seed, work / "halves.pt")
    # the LoRA's layers stay in the transformer that they are trained in
    save_lora(folder, train_regions(halves, *texts, load_parts(folder).transformer, work, seed))
    add_to_manifest(folder, sha256=check_sums(folder))
    print(f"{(time.monotonic() - started_s) / 60:.1f} minutes; wrote into {folder}")


def save_control(folder: Path, control: ZImageControlNetModel) -> None:
    """Write the control network in half precision, in a folder of its own beside the rest."""
    control.half().save_pretrained(folder / "control", safe_serialization=True)


def save_lora(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the LoRA for regions in half precision."""
    (folder / "loras").mkdir(parents=True, exist_ok=True)
    halved = {name: weight.half() for name, weight in weights.items()}
    save_file(halved, folder / "loras" / "regions.safetensors")


if __name__ == "__main__":
    main()
