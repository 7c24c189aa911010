"""Another video of the same words and the same noise: the words' states are changed a little."""

import torch

from models.conditioning import FloatArray
from models.request import SeedVariance


def vary(states: FloatArray, variance: SeedVariance, seed: int) -> FloatArray:
    """states [N, D] with noise on some of them, from the seed alone.

    As InvokeAI's seed variance enhancer: uniform in -1..1 times strength and the states' deviation,
    on percent of them, which are drawn from the next seed.
    """
    given = torch.from_numpy(states)
    noise = torch.rand(given.shape, generator=torch.Generator("cpu").manual_seed(seed)) * 2 - 1
    chance = torch.rand(given.shape, generator=torch.Generator("cpu").manual_seed(seed + 1))
    chosen = chance < variance.percent / 100
    varied: FloatArray = (given + chosen * noise * variance.strength * given.std()).numpy()
    return varied
