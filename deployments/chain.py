"""Binds every deployment of the chain: the one place that knows all of them."""

from pathlib import Path

from ray import serve
from ray.serve import Application

from credits.accounts import (
    AccountId,
    Unauthenticated,
    account_of_key,
    add_api_key,
    create_account,
    find_account,
    hash_api_key,
    new_api_key,
)
from credits.ledger import grant
from credits.pricing import Credits
from deployments.admission import Offer
from deployments.config import AppConfig, Settings, read_or_create_secret, read_settings
from deployments.database import migrate, open_database
from deployments.denoiser import Denoiser
from deployments.ingress import Ingress, IngressParts
from deployments.media_encoder import MediaEncoder
from deployments.pipeline import VideoPipeline
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from media.object_store import LocalObjectStore
from models.catalog import Model, load_model

ROOT = Path(__file__).resolve().parent.parent
LOCAL_ACCOUNT = AccountId("local")


def bind_chain(config: AppConfig) -> Application:
    """Check the checkpoints, migrate the database, and bind every deployment."""
    settings = read_settings(config)
    prepare_database(config, settings)
    offers = _read_offers(config)
    store = LocalObjectStore(settings.storage)
    decoders, denoisers = {}, {}
    for tier in config.tiers:
        models = [
            offer.model
            for offer in offers.values()
            if any(served.tier == tier.tier for served in offer.served_on)
        ]
        denoisers[str(tier.tier)] = serve.deployment(name=f"Denoiser-{tier.tier}")(Denoiser).bind(
            models, tier.torch_threads
        )
        decoders[str(tier.tier)] = serve.deployment(name=f"VaeDecoder-{tier.tier}")(
            VaeDecoder
        ).bind(models, tier.torch_threads)
    text_encoder = serve.deployment()(TextEncoder).bind(
        [offer.model for offer in offers.values()], store, config.tiers[0].torch_threads
    )
    media_encoder = serve.deployment()(MediaEncoder).bind(
        store, settings.home / "scratch", decoders
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
    )
    parts = IngressParts(
        database_url=settings.database_url,
        pepper=settings.pepper,
        store=store,
        offers=offers,
        prices=config.prices,
        plans=config.plans,
        weights=config.work_weights,
        limits=config.limits,
    )
    return serve.deployment()(Ingress).bind(parts, pipeline)


def prepare_database(config: AppConfig, settings: Settings) -> None:
    """Migrate, and make the local account with the key of MUTOSCOPE_HOME if one is configured."""
    engine = open_database(settings.database_url)
    migrate(engine)
    if config.local_account is not None:
        api_key = read_or_create_secret(settings.home / "api_key", new_api_key())
        key_hash = hash_api_key(api_key, settings.pepper)
        with engine.begin() as connection:
            if find_account(connection, LOCAL_ACCOUNT) is None:
                plan = config.local_account.plan
                create_account(connection, LOCAL_ACCOUNT, "local", plan, key_hash)
                grant(connection, LOCAL_ACCOUNT, Credits(config.local_account.credits))
            try:
                account_of_key(connection, key_hash)
            except Unauthenticated:  # the key file was deleted and made anew
                add_api_key(connection, LOCAL_ACCOUNT, key_hash)
    engine.dispose()


def _read_offers(config: AppConfig) -> dict[str, Offer]:
    offers: dict[str, Offer] = {}
    for entry in config.models:
        model: Model = load_model(ROOT / entry.path, entry.id)
        if model.id in offers:
            raise ValueError(f"two models are called {model.id!r}; give one of them an id")
        offers[model.id] = Offer(model, entry.served_on)
    return offers
