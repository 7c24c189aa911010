"""Z-Image's attention written out in real numbers, so that a compiler can fuse it."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class FusibleAttention:
    """What `ZSingleStreamAttnProcessor` computes, for training on a CPU.

    Upstream rotates in complex numbers, which TorchInductor leaves to slow kernels; and for some
    96 tokens the CPU's flash kernel is slower backwards than the plain formula.
    """

    def __init__(self) -> None:
        # Which tokens see which, bool [B, T, T]; None: all see all.
        self.seen: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, T, D]; attention_mask bool [B, T]; freqs_cis complex [B, T, head/2]."""
        assert freqs_cis is not None
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = _rotate(attn.norm_q(query), freqs_cis).type_as(value).transpose(1, 2)
        key = _rotate(attn.norm_k(key), freqs_cis).type_as(value).transpose(1, 2)
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None, None, :], float("-inf"))
        if self.seen is not None:
            scores = scores.masked_fill(~self.seen[:, None], float("-inf"))
        mixed = scores.softmax(dim=-1).type_as(value) @ value.transpose(1, 2)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


def use_fusible_attention(network: nn.Module) -> None:
    """Swap the processor of every attention of the network."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(FusibleAttention())


def _rotate(heads: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotary embedding of heads [B, T, H, head], neighbouring pairs as real and imaginary."""
    turn = torch.view_as_real(freqs_cis).unsqueeze(2)
    cosine, sine = turn[..., 0], turn[..., 1]
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)
