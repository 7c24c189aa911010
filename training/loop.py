"""A training loop that shows its progress and goes on where it was interrupted."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

SAVE_EVERY_S = 60.0


class Stateful(Protocol):
    """A module, an optimiser or a moving average."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""
        ...


def run_steps(
    name: str,
    num_steps: int,
    parts: dict[str, Stateful],
    train_step: Callable[[int], dict[str, float]],
    saved_at: Path,
) -> None:
    """Call train_step(0 .. num_steps-1), saving all parts about once a minute.

    train_step draws its batch from its step number alone, so an interrupted run that starts again
    sees the batches that an uninterrupted one would have seen. Returns at once when saved_at holds
    the last step.
    """
    first = 0
    if saved_at.exists():
        saved = torch.load(saved_at, weights_only=True)
        first = int(saved.pop("step"))
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    saved_s = time.monotonic()
    with tqdm(total=num_steps, initial=first, desc=name, unit="step", mininterval=2.0) as bar:
        for step in range(first, num_steps):
            figures = train_step(step)
            bar.update()
            if step % 10 == 0:
                bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()})
            if time.monotonic() - saved_s > SAVE_EVERY_S or step + 1 == num_steps:
                _save(saved_at, parts, step + 1)
                saved_s = time.monotonic()


def _save(path: Path, parts: dict[str, Stateful], step: int) -> None:
    """Write beside, then rename: a kill in mid-write leaves the older file whole."""
    state: dict[str, Any] = {key: part.state_dict() for key, part in parts.items()}
    partial = path.with_suffix(".partial")
    torch.save({**state, "step": step}, partial)
    os.replace(partial, path)


class MovingAverage:
    """Exponential moving average of modules' parameters; young averages follow faster."""

    def __init__(self, modules: dict[str, torch.nn.Module], decay: float) -> None:
        self.modules = modules
        self.decay = decay
        self.num_updates = 0
        self.average = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average a step towards the modules' present weights."""
        self.num_updates += 1
        weight = 1.0 - min(self.decay, (1.0 + self.num_updates) / (10.0 + self.num_updates))
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    self.average[name][key].lerp_(value, weight)

    def copy_to_modules(self) -> None:
        """Give the modules the averaged weights, for evaluation or saving."""
        for name, module in self.modules.items():
            module.load_state_dict(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages and their age."""
        return {"average": self.average, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved averages."""
        self.average, self.num_updates = state_dict["average"], state_dict["num_updates"]
