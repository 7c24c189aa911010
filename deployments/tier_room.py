"""The memory that each model has on a tier, as the configuration tells it."""

import logging
from dataclasses import replace

from autoscaling.room import TierRoom
from autoscaling.tiers import DTYPES
from deployments.config import TierConfig
from models.catalog import Model
from models.compute import Compute, Dtype, WeightStorage
from models.fit import Gpus, decoder_weights, denoiser_weights
from models.request import ModelFamily

logger = logging.getLogger("ray.serve")


def rooms_of(tier: TierConfig, models: list[Model]) -> dict[str, TierRoom]:
    """By model, all of which are on that tier; nothing if the tier's GPUs are not told.

    ValueError for a model whose manifest does not say what it takes.
    """
    if tier.gpu is None:
        return {}
    dtype = tier.dtype or DTYPES.get(tier.tier, Dtype.BFLOAT16)
    gpus = Gpus(tier.gpu.memory_bytes, tier.gpu.count, dtype)
    for model in models:
        _check_memory(model)
    weights = {model.id: denoiser_weights(model, dtype) for model in models}
    decoders = {model.id: decoder_weights(model, dtype) for model in models}
    limit = tier.denoiser.model_memory_bytes
    rooms = {}
    for model in models:
        others = sum(weights.values()) - weights[model.id]
        if limit is not None:
            others = max(0.0, min(others, limit - weights[model.id]))
        rooms[model.id] = TierRoom(
            gpus,
            degrees=tier.denoiser.degrees,
            resident=others,
            decoders=sum(decoders.values()) - decoders[model.id],
            decoder_beside=tier.gpu.decoder_beside,
            max_batch=tier.denoiser.scheduler.max_batch,
            tiled_above=tier.decoder.tile_above_area,
        )
    return rooms


def choose_storage(tier: TierConfig, model: Model, others: list[Model]) -> WeightStorage:
    """How the weights of a model that nothing is said of lie in a tier's memory, beside the others
    there: the first way with which its default request fits, whole if none does or the tier's GPUs
    are not told.
    """
    if tier.gpu is None:
        return WeightStorage.WHOLE
    default = model.resolve({"prompt": "x", "seed": 0})
    chosen = WeightStorage.WHOLE
    for way in WeightStorage:
        stored = replace(model, compute=Compute(weights=way))
        room = rooms_of(tier, [*others, stored])[model.id]
        fits = room.degrees_for(stored, default) and room.decodes(stored, default)
        if fits and not shares_offloaded(model, way):
            chosen = way
            break
    logger.info("%s on %s: weights %s", model.id, tier.tier, chosen)
    return chosen


def shares_offloaded(model: Model, storage: WeightStorage) -> bool:
    """Whether what its control networks share with it would be on the GPU only while something else
    runs.
    """
    shares = model.manifest.family is ModelFamily.Z_IMAGE_VIDEO  # its embedders
    return storage is WeightStorage.OFFLOADED and shares and bool(model.controls)


def _check_memory(model: Model) -> None:
    if model.manifest.memory is None:
        raise ValueError(
            f"{model.folder}: tiers[].gpu is told, but the manifest says not what memory the model "
            f"takes; `mutoscope models memory {model.folder}` finds it out"
        )
