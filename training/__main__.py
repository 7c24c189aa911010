"""`python -m training` makes models/demo from nothing; an interrupted run goes on."""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from models.weight_files import check_sums
from training.text_encoder import make_text_encoder, make_tokenizer, save_text_encoder
from training.train_denoiser import encode_clips, train_denoiser
from training.train_vae import reconstruction_scores, train_vae

MANIFEST = Path(__file__).with_name("manifest.json")


def main() -> None:
    """Train, then write the checkpoint; prints how long each part took."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--work", type=Path, help="default: out/training/seed-N")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--no-compile", action="store_true", help="train without a C++ compiler, slower"
    )
    arguments = parser.parse_args()
    if not arguments.no_compile:
        _require_compiler()
    work: Path = arguments.work or Path(f"out/training/seed-{arguments.seed}")
    work.mkdir(parents=True, exist_ok=True)

    started_s = time.monotonic()
    vae = train_vae(work, arguments.seed)
    print(f"VAE: {_minutes(started_s)}; held-out clips survive it: {reconstruction_scores(vae)}")
    clips = encode_clips(vae, arguments.seed, work / "clips.pt")
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer(arguments.seed)
    text_encoder = make_text_encoder(len(tokenizer))
    transformer = train_denoiser(
        clips,
        tokenizer,
        text_encoder,
        work,
        arguments.seed,
        compile_blocks=not arguments.no_compile,
    )
    save_checkpoint(arguments.out, vae, tokenizer, text_encoder.eval(), transformer)
    print(f"all: {_minutes(started_s)}; wrote {arguments.out}")


def save_checkpoint(
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
) -> None:
    """Write diffusers' layout in half precision, with the manifest and its check sums."""
    save_text_encoder(tokenizer, text_encoder.half(), folder)
    vae.half().save_pretrained(folder / "vae", safe_serialization=True)
    transformer.half().save_pretrained(folder / "transformer", safe_serialization=True)
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    manifest = json.loads(MANIFEST.read_text())
    manifest["sha256"] = check_sums(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _require_compiler() -> None:
    """Ask TorchInductor itself, before twenty minutes of training have passed."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SystemExit("training compiles: install g++, or pass --no-compile") from error


def _minutes(started_s: float) -> str:
    return f"{(time.monotonic() - started_s) / 60:.1f} minutes"


if __name__ == "__main__":
    main()
