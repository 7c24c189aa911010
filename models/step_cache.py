"""Steps that make do with an earlier prediction, and steps without the negative text.

Nothing but the state says which: what is compared and what is reused is in it, at full shape. So a
request that was parked, killed or given to other ranks goes on with the same pixels; that is why
the prediction is reused and not, as elsewhere, the blocks' residual, which is a hundred times as
large. One rank decides for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.compute import FirstBlockOnly
from models.request import CacheBy, VideoRequest
from models.tensors import DenoiseState
from parallel.mesh import Mesh
from parallel.sequence import SequenceSharding
from parallel.shard import Shard

SAMPLED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Predicted:
    """A guided prediction [1, C, F, H, W], how many passes of the model it made do without, and
    what later steps may reuse.
    """

    prediction: Tensor
    skipped: int = 0
    cache: Mapping[str, Tensor] = field(default_factory=dict)

    def note(self, state: DenoiseState, before: DenoiseState) -> DenoiseState:
        """The state after the step, with what this says of it."""
        return replace(state, skipped=before.skipped + self.skipped, cache=self.cache)


class FirstBlock:
    """Looks at what a transformer's first block adds to some of the image's tokens.

    They come first in the blocks' sequence, of which each rank has its part.
    """

    def __init__(self, block: nn.Module, sharding: SequenceSharding) -> None:
        self.sharding = sharding
        self.num_tokens = 0
        self.judge: Callable[[Tensor], bool] | None = None
        # before the last block's hook, should it be the last one: there the tokens are joined
        block.register_forward_hook(self._look, prepend=True)

    def _look(self, _block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """FirstBlockOnly, if the judge says that it is enough. It is asked once a step."""
        judge, self.judge = self.judge, None
        if judge is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if judge(self._sample((hidden[:1] - args[0][:1]).float())):
            raise FirstBlockOnly

    def _sample(self, added: Tensor) -> Tensor:
        """Every so manieth of the image's tokens, [1, n, D], the same on all ranks of a text."""
        stride = -(-self.num_tokens // SAMPLED_TOKENS)
        wanted = range(0, self.num_tokens, stride)
        everyone = self.sharding.everyone
        shards = [Shard(self.sharding.tokens.sizes, rank) for rank in range(everyone.size)]
        if everyone.size == 1:
            return added[:, list(wanted)]
        held = [
            [token for token in wanted if 0 <= token - shard.offset < shard.size]
            for shard in shards
        ]
        own = [token - shards[everyone.rank].offset for token in held[everyone.rank]]
        return everyone.all_gather(added[:, own], [len(tokens) for tokens in held], 1)


class StepCache:
    """Of one denoiser. first_block: None if its model has no blocks that could be looked at."""

    def __init__(self, first_block: FirstBlock | None = None) -> None:
        self.first_block = first_block

    def predict(
        self,
        request: VideoRequest,
        state: DenoiseState,
        seen: Tensor,
        compute: Callable[[bool], Tensor],
        mesh: Mesh,
        num_tokens: int = 0,
    ) -> Predicted:
        """seen: the latents as the model gets them. compute: predicts with guidance, or without.

        num_tokens: how many of them the image is for the first block.
        """
        guided = request.guided and not request.skips_guidance(state.step)
        skipped = request.guided - guided
        wanted = request.step_cache
        if wanted is None:
            return Predicted(compute(guided), skipped)
        step = state.step - request.first_step
        is_free = step >= wanted.warm_up and state.step + 1 < request.last_step
        held = state.cache if is_free else {}
        if wanted.by is CacheBy.PREDICTION:
            enough = "rate" in held and agreed(
                bool(_expected_change(held, seen) < wanted.threshold), mesh, seen.device
            )
            if enough:
                return Predicted(held["prediction"], request.passes_per_step, held)
            prediction = compute(guided)
            return Predicted(prediction, skipped, _kept(prediction, seen, state.cache))
        assert self.first_block is not None
        sampled: list[Tensor] = []

        def is_enough(added: Tensor) -> bool:
            sampled.append(added)
            before = held.get("first_block")
            enough = before is not None and _change(added, before) < wanted.threshold
            return agreed(enough, mesh, seen.device)

        self.first_block.num_tokens = num_tokens
        self.first_block.judge = is_enough
        try:
            prediction = compute(guided)
        except FirstBlockOnly:
            return Predicted(held["prediction"], request.passes_per_step, held)
        finally:
            self.first_block.judge = None
        cache = {"prediction": prediction, "first_block": sampled[0]}
        return Predicted(prediction, skipped, cache)


def _kept(prediction: Tensor, seen: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `_expected_change` needs; rate: how much more the prediction changed than the latents,
    from one that was computed to the next.
    """
    kept = {"prediction": prediction, "seen": seen}
    if before:
        changed = (prediction - before["prediction"]).abs().mean()
        kept["rate"] = changed / (seen - before["seen"]).abs().mean()
    return kept


def _expected_change(held: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    """Of the prediction since it was computed, relative to it, at the rate that it last had."""
    moved = (seen - held["seen"]).abs().mean()
    return held["rate"] * moved / held["prediction"].abs().mean()


def _change(now: Tensor, before: Tensor) -> float:
    """Relative, in the mean."""
    return float((now - before).abs().mean() / before.abs().mean())


def agreed(decision: bool, mesh: Mesh, device: torch.device) -> bool:
    """The first rank's, on every rank: ranks that disagreed would wait for each other for ever."""
    flag = torch.tensor([decision], dtype=torch.uint8, device=device)
    for group in (mesh.part, mesh.guidance):
        flag = group.broadcast(flag)
    return bool(flag.item())
