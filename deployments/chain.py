"""Binds every deployment of the chain: the one place that knows all of them."""

from dataclasses import replace
from pathlib import Path

from ray import serve
from ray.serve import Application

from autoscaling.room import TierRoom
from autoscaling.tiers import GpuTier
from deployments.admission import Offer
from deployments.config import AppConfig, LoraConfig, TierConfig, read_settings
from deployments.denoiser import Denoiser
from deployments.ingress import Ingress, IngressParts
from deployments.media_encoder import MediaEncoder
from deployments.pipeline import VideoPipeline
from deployments.resident_models import how_many_fit
from deployments.text_encoder import TextEncoder
from deployments.tier_room import choose_storage, rooms_of, shares_offloaded
from deployments.vae_decoder import VaeDecoder
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model
from models.compute import Compute
from models.control import ControlDoesNotFit, load_control_net
from models.fetch import fetch
from models.licence import check_licence
from models.lora import Lora, load_lora
from models.source import Remote, in_cache, parse_source

ROOT = Path(__file__).resolve().parent.parent


def bind_chain(config: AppConfig) -> Application:
    """Check the checkpoints and bind every deployment.

    Serve may run this on any node: it brings checkpoints that lie elsewhere into the cache there;
    of the home folder's rest and the database only the replicas know.
    """
    settings = read_settings(config)
    offers = with_storage(_read_offers(config, settings.model_cache), config.tiers)
    offers = with_room(offers, config.tiers)
    for offer in offers.values():
        check_weights(offer)
    store = LocalObjectStore(settings.storage)
    decoders, denoisers = {}, {}
    for tier in config.tiers:
        models = models_of(offers, tier)
        how_many_fit(
            models, tier.denoiser.model_memory_bytes
        )  # ModelTooLarge, before anything runs
        denoisers[str(tier.tier)] = serve.deployment(name=f"Denoiser-{tier.tier}")(Denoiser).bind(
            models, store, tier
        )
        decoders[str(tier.tier)] = serve.deployment(name=f"VaeDecoder-{tier.tier}")(
            VaeDecoder
        ).bind(models, tier.torch_threads)
    of_encoder = Compute(dtype=config.encoder.dtype)
    text_encoder = serve.deployment()(TextEncoder).bind(
        [replace(offer.model, compute=of_encoder) for offer in offers.values()],
        store,
        config.encoder,
        config.tiers[0].torch_threads,
    )
    media_encoder = serve.deployment()(MediaEncoder).bind(
        store,
        settings.home / "scratch" / "encode",
        decoders,
        [offer.model for offer in offers.values()],
        config.tiers,
        {
            tier.tier: {
                name: offer.room[tier.tier]
                for name, offer in offers.items()
                if tier.tier in offer.room
            }
            for tier in config.tiers
        },
    )
    pipeline = serve.deployment()(VideoPipeline).bind(
        settings.database_url,
        store,
        text_encoder,
        denoisers,
        media_encoder,
        config.tiers,
        config.leases,
        config.work_weights,
        settings.home,
        config.webhooks,
        [offer.model for offer in offers.values()],
        {str(tier.tier): at_any_size(offers, tier) for tier in config.tiers},
    )
    parts = IngressParts(
        home=settings.home,
        database_url=settings.database_url,
        local_account=config.local_account,
        store=store,
        offers=offers,
        prices=config.prices,
        plans=config.plans,
        weights=config.work_weights,
        limits=config.limits,
        rates=config.request_rates,
        webhooks=config.webhooks,
        image_urls=config.image_urls,
    )
    return serve.deployment()(Ingress).bind(parts, pipeline)


def models_of(offers: dict[str, Offer], tier: TierConfig) -> list[Model]:
    """Those that a tier serves, and how it computes them."""
    return [
        replace(
            offer.model,
            compute=Compute(dtype=tier.dtype, attention=tier.attention, weights=served.storage),
        )
        for offer in offers.values()
        for served in offer.served_on
        if served.tier == tier.tier
    ]


def at_any_size(offers: dict[str, Offer], tier: TierConfig) -> list[str]:
    """The models that a tier serves at every size that they have."""
    return [
        name
        for name, offer in offers.items()
        for served in offer.served_on
        if served.tier == tier.tier and served.max_area is None
    ]


def with_storage(offers: dict[str, Offer], tiers: list[TierConfig]) -> dict[str, Offer]:
    """The offers, with a way of keeping weights wherever none was said; tier by tier, one model
    after the other, each beside those before it.
    """
    decided = dict(offers)
    for tier in tiers:
        for name, offer in offers.items():
            others = [model for model in models_of(decided, tier) if model.id != name]
            served_on = tuple(
                served.model_copy(update={"weights": choose_storage(tier, offer.model, others)})
                if served.tier == tier.tier and served.weights is None
                else served
                for served in decided[name].served_on
            )
            decided[name] = replace(decided[name], served_on=served_on)
    return decided


def with_room(offers: dict[str, Offer], tiers: list[TierConfig]) -> dict[str, Offer]:
    """The offers, with the memory that each has on the tiers whose GPUs are told.

    ValueError for a model whose manifest does not say what it takes.
    """
    rooms: dict[str, dict[GpuTier, TierRoom]] = {name: {} for name in offers}
    for tier in tiers:
        for name, room in rooms_of(tier, models_of(offers, tier)).items():
            rooms[name][tier.tier] = room
    return {name: replace(offer, room=rooms[name]) for name, offer in offers.items()}


def check_weights(offer: Offer) -> None:
    """ValueError for what would lie on the GPU only while something else runs."""
    for served in offer.served_on:
        if shares_offloaded(offer.model, served.storage):
            raise ValueError(
                f"{offer.model.id} on {served.tier}: its control networks share layers with it, "
                f"so its weights cannot be {served.storage}"
            )


def at_hand(path: str, cache: Path) -> tuple[Path, Remote | None]:
    """Where a configured checkpoint lies on this machine, and what other machines get it by."""
    source = parse_source(path)
    if source is None:
        return ROOT / path, None
    remote = in_cache(source, cache)
    fetch(remote)
    return remote.path, remote


def _read_offers(config: AppConfig, cache: Path) -> dict[str, Offer]:
    offers: dict[str, Offer] = {}
    loras: list[tuple[Lora, LoraConfig]] = []
    for lora_entry in config.loras:
        path, remote = at_hand(lora_entry.path, cache)
        loras.append((replace(load_lora(path, lora_entry.id), remote=remote), lora_entry))
    controls = []
    for net_entry in config.controls:
        path, remote = at_hand(net_entry.path, cache)
        net = load_control_net(path, net_entry.id, net_entry.kinds)
        controls.append(replace(net, remote=remote))
    for entry in config.models:
        path, remote = at_hand(entry.path, cache)
        model = replace(load_model(path, entry.id), remote=remote)
        model = replace(
            model,
            loras=tuple(
                lora
                for lora, lora_entry in loras
                if lora.fits(model) and model.id in (lora_entry.models or (model.id,))
            ),
            controls=tuple(net for net in controls if net.fits(model)),
        )
        if model.id in offers:
            raise ValueError(f"two models are called {model.id!r}; give one of them an id")
        if entry.licence_override is None:
            check_licence(model, config.operation)  # LicenceForbids
        offers[model.id] = Offer(model, entry.served_on, entry.licence_override)
    offered = [offer.model for offer in offers.values()]
    for lora, lora_entry in loras:
        if not any(lora in model.loras for model in offered):
            named = "" if lora_entry.models is None else f" of {', '.join(lora_entry.models)}"
            raise ValueError(f"{lora.path}: a LoRA for {lora.base}, which no model{named} here is")
    for net in controls:
        if not any(net.fits(model) for model in offered):
            reasons = "; ".join(str(net.misfit(model)) for model in offered)
            raise ControlDoesNotFit(str(net.folder), reasons)
    return offers
