"""Shares the tokens of diffusers' full-attention transformers between ranks.

Hooks split the sequences where the transformer makes them and join them where it is done; the
attention processors are diffusers' own with the attention itself replaced. Texts come trimmed to
their valid tokens, one batch entry at a time, so that no mask is needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from parallel.sequence import SequenceSharding
from parallel.shard import Shard

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


MASKED = "a shared sequence takes no mask: give one text at a time, trimmed to its tokens"


def shard_z_image(transformer: ZImageTransformer2DModel) -> SequenceSharding:
    """Prepare the transformer; after `use` of what is returned, each rank does its part.

    Inputs and outputs are whole, and the same on every rank.
    """
    sharding = SequenceSharding()
    when_shared = partial(_when_shared, sharding)
    for blocks in (transformer.noise_refiner, transformer.layers):
        stretch = ZImageStretch(sharding)
        for index, block in enumerate(blocks):
            enter = stretch.enter_first if index == 0 else stretch.enter
            block.register_forward_pre_hook(when_shared(enter))
            # in every other layer the regions of a text are told apart
            restricted = blocks is transformer.layers and index % 2 == 0
            processor = ZImageProcessor(stretch, block.attention.processor, restricted=restricted)
            block.attention.set_processor(processor)
        blocks[-1].register_forward_hook(when_shared(stretch.leave))
    cut_control = partial(_cut_control, sharding, len(transformer.layers) - 1)
    transformer.register_forward_pre_hook(when_shared(cut_control), with_kwargs=True)
    return sharding


def _when_shared(sharding: SequenceSharding, act: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that changes nothing while there is nobody to share with."""

    def hook(_module: nn.Module, *given: Any) -> Any:
        return act(*given) if sharding.everyone.size > 1 else None

    return hook


class ZImageStretch:
    """A run of blocks over one sequence: the image's tokens, or the image's and the text's."""

    def __init__(self, sharding: SequenceSharding) -> None:
        self.sharding = sharding
        self.tokens = Shard((1,), 0)

    def enter_first(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the first block: cut the tokens, then as before the others."""
        self.tokens = self.sharding.tokens = self.sharding.shard(args[0].shape[1])
        return self.enter((self.tokens.cut(args[0], 1), *args[1:]))

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before each block: (hidden, mask, rotary embedding, ...); cut the embedding."""
        hidden, mask, rotary, *rest = args
        if mask is not None:
            raise ValueError(MASKED)
        return (hidden, None, self.tokens.cut(rotary, 1), *rest)

    def leave(self, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """After the last block: all tokens again."""
        return self.sharding.everyone.all_gather(hidden, self.tokens.sizes, 1)


class LocalSamples(dict[int, Tensor]):
    """A control network's residuals, of this rank's tokens already."""


def _cut_control(
    sharding: SequenceSharding, last_layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """Cut a control network's residuals, but the last: there the tokens are whole again."""
    samples = kwargs.get("controlnet_block_samples")
    if samples is None or isinstance(samples, LocalSamples):
        return args, kwargs
    tokens = sharding.shard(next(iter(samples.values())).shape[1])
    cut = {
        layer: sample if layer == last_layer else tokens.cut(sample, 1)
        for layer, sample in samples.items()
    }
    return args, kwargs | {"controlnet_block_samples": cut}


class ZImageProcessor:
    """diffusers' `ZSingleStreamAttnProcessor`, attending over every rank's tokens.

    restricted: or over those only that the sharding's restriction lets a token see.
    """

    def __init__(self, stretch: ZImageStretch, stock: Any, *, restricted: bool = False) -> None:
        self.stretch = stretch
        self.stock = stock
        self.restricted = restricted

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: [1, N, D], this rank's tokens."""
        sharding = self.stretch.sharding
        restriction = sharding.restriction if self.restricted else None
        is_whole = sharding.everyone.size == 1
        if is_whole and restriction is None:
            whole: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis
            )
            return whole
        if attention_mask is not None:
            raise ValueError(MASKED)
        query, key, value = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        query, key = _normalise(query, attn.norm_q), _normalise(key, attn.norm_k)
        if freqs_cis is not None:
            query, key = _rotate(query, freqs_cis), _rotate(key, freqs_cis)
        lengths = [hidden_states.shape[1]] if is_whole else list(self.stretch.tokens.sizes)
        attended = sharding.attend(query, key, value, lengths, restriction).flatten(2, 3)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended


def shard_hunyuan_video(transformer: HunyuanVideoTransformer3DModel) -> SequenceSharding:
    """Prepare the transformer; after `use` of what is returned, each rank does its part.

    Inputs and outputs are whole, and the same on every rank; the text is trimmed.
    """
    sharding = SequenceSharding()
    when_shared = partial(_when_shared, sharding)
    sequences = HunyuanSequences(sharding)
    transformer.register_forward_pre_hook(when_shared(sequences.check_text), with_kwargs=True)
    transformer.rope.register_forward_hook(when_shared(sequences.cut_rotary))
    transformer.x_embedder.register_forward_hook(when_shared(sequences.cut_image))
    transformer.context_embedder.register_forward_hook(when_shared(sequences.cut_text))
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.register_forward_pre_hook(when_shared(sequences.count_first_frame))
        block.attn.set_processor(HunyuanProcessor(sequences, block.attn.processor))
    transformer.proj_out.register_forward_hook(when_shared(sequences.join_image))
    return sharding


class HunyuanSequences:
    """The image's and the text's tokens, each cut by itself: a rank holds some of both.

    A rank that gets no text token carries one empty one, since the blocks slice by the text's
    length from the end; its processor leaves that one out of the attention.
    """

    def __init__(self, sharding: SequenceSharding) -> None:
        self.sharding = sharding
        self.image = self.text = Shard((1,), 0)

    def check_text(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """ValueError if the text is padded: (latents, timestep, text, mask, ...)."""
        mask = kwargs["encoder_attention_mask"] if len(args) < 4 else args[3]
        if not bool(mask.all()):
            raise ValueError(MASKED)

    def cut_rotary(
        self, _args: tuple[Any, ...], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, [N, D] each."""
        shard = self.sharding.shard(rotary[0].shape[0])
        return shard.cut(rotary[0], 0), shard.cut(rotary[1], 0)

    def cut_image(self, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """[1, N, D]"""
        self.image = self.sharding.tokens = self.sharding.shard(hidden.shape[1])
        return self.image.cut(hidden, 1)

    def cut_text(self, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """[1, N, D]"""
        self.text = self.sharding.shard(hidden.shape[1])
        cut = self.text.cut(hidden, 1)
        return cut if self.text.size else hidden.new_zeros(1, 1, hidden.shape[2])

    def count_first_frame(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The last argument is how many tokens the first frame has; here, how many of them."""
        here = min(max(args[-1] - self.image.offset, 0), self.image.size)
        return (*args[:-1], here)

    def join_image(self, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """[1, N, D], of all ranks."""
        return self.sharding.everyone.all_gather(hidden, self.image.sizes, 1)


class HunyuanProcessor:
    """diffusers' `HunyuanVideoAttnProcessor2_0`, attending over every rank's tokens."""

    def __init__(self, sequences: HunyuanSequences, stock: Any) -> None:
        self.sequences = sequences
        self.stock = stock

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, encoder_hidden_states: [1, N, D], this rank's image and text tokens."""
        if self.sequences.sharding.everyone.size == 1:
            whole: tuple[Tensor, Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return whole
        image = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        image[0] = _normalise(image[0], attn.norm_q)
        image[1] = _normalise(image[1], attn.norm_k)
        if image_rotary_emb is not None:
            image[:2] = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in image[:2]]
        if attn.add_q_proj is None:
            text = _project(attn, encoder_hidden_states, "to_q", "to_k", "to_v")
            norms = attn.norm_q, attn.norm_k
        else:
            text = _project(attn, encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj")
            norms = attn.norm_added_q, attn.norm_added_k
        text[:2] = [_normalise(x, norm) for x, norm in zip(text[:2], norms, strict=True)]
        attended_image, attended_text = self._attend(image, text)
        if attn.to_out is not None:
            for layer in attn.to_out:
                attended_image = layer(attended_image)
        if attn.to_add_out is not None:
            attended_text = attn.to_add_out(attended_text)
        return attended_image, attended_text

    def _attend(self, image: list[Tensor], text: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Query, key and value [1, N, H, D] of both; the results are [1, N, H * D]."""
        sequences = self.sequences
        num_image, num_text = sequences.image.size, sequences.text.size
        query, key, value = (
            torch.cat([of_image, of_text[:, :num_text]], dim=1)
            for of_image, of_text in zip(image, text, strict=True)
        )
        lengths = [i + t for i, t in zip(sequences.image.sizes, sequences.text.sizes, strict=True)]
        attended = sequences.sharding.attend(query, key, value, lengths).flatten(2, 3)
        attended_text = attended[:, num_image:]
        if num_text == 0:
            attended_text = attended.new_zeros(1, 1, attended.shape[2])
        return attended[:, :num_image], attended_text


def _project(attn: Attention, hidden: Tensor, *names: str) -> list[Tensor]:
    """[B, N, D] -> [B, N, H, D/H], by each of the named layers."""
    return [getattr(attn, name)(hidden).unflatten(2, (attn.heads, -1)) for name in names]


def _normalise(hidden: Tensor, norm: nn.Module | None) -> Tensor:
    return hidden if norm is None else norm(hidden)


def _rotate(hidden: Tensor, rotary: Tensor) -> Tensor:
    """hidden: [B, N, H, D]; rotary: complex [B, N, D/2]. In float32, as in diffusers."""
    pairs = torch.view_as_complex(hidden.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary.unsqueeze(2)).flatten(3).type_as(hidden)
