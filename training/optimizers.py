"""What the demo model's networks are trained by: Muon for matrices, AdamW for the rest."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.loop import Stateful

LEARNING_RATE = 2e-3
WARM_UP_STEPS = 80


class MuonAndAdam:
    """Muon (torch's, scaled as AdamW's steps are) and AdamW over the parameters of modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = list(modules)
        self.parameters = [weight for module in found for weight in module.parameters()]
        matrices = [
            layer.weight
            for module in found
            for layer in module.modules()
            if isinstance(layer, nn.Linear)
        ]
        others = [p for p in self.parameters if not any(p is matrix for matrix in matrices)]
        self.muon = torch.optim.Muon(
            matrices, LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(others, LEARNING_RATE, (0.9, 0.98), weight_decay=0.0)

    @property
    def parts(self) -> dict[str, Stateful]:
        """For a run that goes on."""
        return {"muon": self.muon, "adam": self.adam}

    def back(self, loss: Tensor) -> None:
        """Gradients of a loss, inside of whatever it was computed in."""
        for optimizer in (self.muon, self.adam):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def step(self, rate: float) -> None:
        """Clip and go, at a share of the learning rate."""
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
        given = [p for p in self.parameters if p.grad is not None]
        nn.utils.clip_grad_norm_(given, 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()


def rate_at(step: int, num_steps: int) -> float:
    """Up in the first steps, flat to the middle, then down to a hundredth."""
    return min((step + 1) / WARM_UP_STEPS, 1.0, max((1 - step / num_steps) / 0.5, 0.01))
