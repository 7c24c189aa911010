"""What Z-Image is told: Qwen3's states of the words, and the VAE's latents of images and videos."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from models.catalog import Model
from models.conditioning import FloatArray, TextPlaces, ZImageConditioning
from models.embeddings import Embeddings, digest, no_embeddings
from models.regions import each_frame, latent_mask, token_places
from models.request import LoraUse, VideoRequest
from models.seed_variance import vary
from models.start_image import pad_frames, pad_start_image
from models.text_loras import TextLoras
from models.video_vae import load_video_vae
from models.weights import choose_device, choose_dtype, load_component

PATCH_SIZE = 2


class ZImageVideoEncoder:
    """Qwen3's last hidden state but one for the words, the VAE's latents for a start image."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = choose_device()
        dtype = choose_dtype(self.device, model.compute)
        self.tokenizer = AutoTokenizer.from_pretrained(
            model.folder / "tokenizer", local_files_only=True, trust_remote_code=False
        )
        self.text_encoder = load_component(
            Qwen3Model, model.folder / "text_encoder", dtype, self.device
        )
        self.loras = TextLoras(self.text_encoder, model.loras)
        self.vae = load_video_vae(model, "encoder")

    @torch.inference_mode()
    def encode(
        self,
        request: VideoRequest,
        start_image: bytes | None,
        source_frames: NDArray[np.uint8] | None = None,
        embeddings: Embeddings | None = None,
        region_masks: NDArray[np.bool_] | None = None,
    ) -> ZImageConditioning:
        """Guidance of 1 needs no negative text. Raises nothing of the user's making.

        region_masks: bool [M, F or 1, H, W], of the regions that have one.
        """
        kept = embeddings or no_embeddings()
        limit = self.model.max_text_tokens(request)
        positive, num_tokens, places = self._encode_positive(request, region_masks, kept)
        negative = None
        if request.guided:
            negative, _ = self._encode_text(request.negative_prompt, limit, request.loras, kept)
        generated_size = self.model.spec.generated_size(request.width, request.height)
        start_latents = source_latents = None
        if start_image is not None:
            pixels = pad_start_image(start_image, generated_size=generated_size)[:, None]
            key = ("image", digest(start_image), generated_size)
            (start_latents,) = kept.get(key, lambda: (self.vae.encode(pixels),))
        if source_frames is not None:
            source_latents = self._encode_frames(request, source_frames, kept)
        return ZImageConditioning(
            positive, negative, start_latents, source_latents, num_tokens, places=places
        )

    def _encode_positive(
        self, request: VideoRequest, masks: NDArray[np.bool_] | None, kept: Embeddings
    ) -> tuple[FloatArray, int, TextPlaces | None]:
        """The prompt's states and its regions', one after the other; the tokens of the longest."""
        limit = self.model.max_text_tokens(request)
        texts = [request.prompt, *(region.prompt for region in request.regions)]
        encoded = [self._encode_text(text, limit, request.loras, kept) for text in texts]
        num_tokens = max(count for _, count in encoded)
        parts = [states for states, _ in encoded]
        spec, variance = self.model.spec, request.seed_variance
        places = token_places(spec, request, masks, PATCH_SIZE)
        if variance is not None and variance.per_frame:
            parts = [vary(parts[0], variance, request.seed + 2 * f) for f in range(places.shape[1])]
            places = each_frame(places)
        elif variance is not None:
            parts = [vary(states, variance, request.seed) for states in parts]
        if len(parts) == 1:
            return parts[0], num_tokens, None
        lengths = tuple(map(len, parts))
        return np.concatenate(parts), num_tokens, TextPlaces(lengths, places)

    def encode_mask(self, request: VideoRequest, pictures: NDArray[np.uint8]) -> FloatArray:
        """Grey pictures [F or 1, H, W, 3] by latents; a latent is as white as its whitest pixel."""
        return latent_mask(self.model.spec, request, pictures)

    @torch.inference_mode()
    def encode_control(
        self,
        request: VideoRequest,
        frames: NDArray[np.uint8],
        embeddings: Embeddings | None = None,
    ) -> FloatArray:
        """Latents [C, F, H, W] of the video that leads; the last frame repeats to a valid count."""
        return self._encode_frames(request, frames, embeddings or no_embeddings())

    def _encode_frames(
        self, request: VideoRequest, frames: NDArray[np.uint8], kept: Embeddings
    ) -> FloatArray:
        spec = self.model.spec
        size = spec.generated_size(request.width, request.height)
        count = spec.generated_frames(request.num_frames, request.f_patch_size)
        every = frames[np.minimum(np.arange(count), len(frames) - 1)]
        pixels = pad_frames(every, generated_size=size)
        (latents,) = kept.get(("frames", digest(pixels), size), lambda: (self.vae.encode(pixels),))
        return latents

    def _encode_text(
        self, text: str, limit: int, loras: Sequence[LoraUse], kept: Embeddings
    ) -> tuple[FloatArray, int]:
        """[N, D] without padding, and the number of tokens before truncation."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        token_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        key = ("text", text, limit, self.loras.key(loras))
        (states,) = kept.get(key, lambda: (self._states(token_ids[:limit], loras),))
        return states, len(token_ids)

    def _states(self, token_ids: list[int], loras: Sequence[LoraUse]) -> FloatArray:
        cut = torch.tensor([token_ids], device=self.device)
        with self.loras.used(loras):
            states = self.text_encoder(input_ids=cut, output_hidden_states=True).hidden_states[-2]
        read: FloatArray = states[0].float().cpu().numpy()
        return read
