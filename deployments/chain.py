"""Binds every deployment of the chain: the one place that knows all of them."""

from dataclasses import replace
from pathlib import Path

from ray import serve
from ray.serve import Application

from deployments.admission import Offer
from deployments.config import AppConfig, read_settings
from deployments.denoiser import Denoiser
from deployments.ingress import Ingress, IngressParts
from deployments.media_encoder import MediaEncoder
from deployments.pipeline import VideoPipeline
from deployments.resident_models import how_many_fit
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from media.object_store import LocalObjectStore
from models.catalog import load_model
from models.control import ControlDoesNotFit, load_control_net
from models.licence import check_licence
from models.lora import load_lora

ROOT = Path(__file__).resolve().parent.parent


def bind_chain(config: AppConfig) -> Application:
    """Check the checkpoints and bind every deployment.

    Serve may run this on any node: only the replicas touch the home folder and the database.
    """
    settings = read_settings(config)
    offers = _read_offers(config)
    store = LocalObjectStore(settings.storage)
    decoders, denoisers = {}, {}
    for tier in config.tiers:
        models = [
            offer.model
            for offer in offers.values()
            if any(served.tier == tier.tier for served in offer.served_on)
        ]
        how_many_fit(
            models, tier.denoiser.model_memory_bytes
        )  # ModelTooLarge, before anything runs
        denoisers[str(tier.tier)] = serve.deployment(name=f"Denoiser-{tier.tier}")(Denoiser).bind(
            models, store, tier
        )
        decoders[str(tier.tier)] = serve.deployment(name=f"VaeDecoder-{tier.tier}")(
            VaeDecoder
        ).bind(models, tier.torch_threads)
    text_encoder = serve.deployment()(TextEncoder).bind(
        [offer.model for offer in offers.values()],
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


def _read_offers(config: AppConfig) -> dict[str, Offer]:
    offers: dict[str, Offer] = {}
    loras = [load_lora(ROOT / entry.path, entry.id) for entry in config.loras]
    controls = [
        load_control_net(ROOT / entry.path, entry.id, entry.kinds) for entry in config.controls
    ]
    for entry in config.models:
        model = load_model(ROOT / entry.path, entry.id)
        model = replace(
            model,
            loras=tuple(lora for lora in loras if lora.fits(model)),
            controls=tuple(net for net in controls if net.fits(model)),
        )
        if model.id in offers:
            raise ValueError(f"two models are called {model.id!r}; give one of them an id")
        if entry.licence_override is None:
            check_licence(model, config.operation)  # LicenceForbids
        offers[model.id] = Offer(model, entry.served_on, entry.licence_override)
    offered = [offer.model for offer in offers.values()]
    for lora in loras:
        if not any(lora.fits(model) for model in offered):
            raise ValueError(f"{lora.path}: a LoRA for {lora.base}, which no model here is")
    for net in controls:
        if not any(net.fits(model) for model in offered):
            reasons = "; ".join(str(net.misfit(model)) for model in offered)
            raise ControlDoesNotFit(str(net.folder), reasons)
    return offers
