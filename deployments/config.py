"""The configuration: one tree, validated once, and the only place that reads the environment."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from autoscaling.pool_scaling import PoolScaling
from autoscaling.step_scheduler import StepSchedulerConfig
from autoscaling.tiers import LADDER, GpuTier, ServedOn
from autoscaling.urgency import UrgencyConfig
from credits.plans import Plan, PlanTable
from credits.pricing import PriceTable, WorkWeights
from credits.rates import RequestRate
from deployments.url_guard import UrlGuardConfig
from deployments.webhooks import WebhookConfig
from models.compute import Attention, Dtype
from models.licence import OperationConfig
from models.request import ControlKind
from models.source import HubSource, parse_source
from models.start_image import ImageLimits


class LocalConfig(BaseModel, frozen=True, extra="forbid"):
    """Objects as files in a directory; by default storage/ in MUTOSCOPE_HOME."""

    kind: Literal["local"] = "local"
    directory: Path | None = None


def _check_source(path: str) -> str:
    source = parse_source(path)
    if isinstance(source, HubSource) and not source.is_pinned:
        raise ValueError(
            f"{path}: name the commit, so that every machine has the same; "
            f"`mutoscope models pin {path}` tells the newest"
        )
    return path


# Relative to the project's root or absolute; or s3://bucket/key or hf://owner/name@commit[/path],
# which every machine that needs it brings into its model_cache.
CheckpointPath = Annotated[str, Field(min_length=1), AfterValidator(_check_source)]


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint's folder, and who serves it.

    id is its name in the API, by default its family's. licence_override: why it may be offered
    although the licence in its manifest does not allow it; shown by the API.
    """

    path: CheckpointPath
    id: str | None = None
    licence_override: str | None = Field(None, min_length=1)
    served_on: tuple[ServedOn, ...] = Field(min_length=1)


class LoraConfig(BaseModel, frozen=True, extra="forbid"):
    """A LoRA's safetensors file, and its name in requests; it goes to every model of the kind that
    it was made for, or to those of them that are named.
    """

    path: CheckpointPath
    id: str = Field(min_length=1, max_length=128)
    models: tuple[str, ...] | None = Field(None, min_length=1)


class ControlConfig(BaseModel, frozen=True, extra="forbid"):
    """A control network's folder in diffusers' layout, and what it was trained on, which its files
    do not tell; it goes to every model that it fits.
    """

    path: CheckpointPath
    id: str = Field(min_length=1, max_length=128)
    kinds: tuple[ControlKind, ...] = Field(min_length=1)


class EncoderConfig(BaseModel, frozen=True, extra="forbid"):
    """cache_bytes: what encoded texts and images may take in each text encoder; 0: none is kept.

    dtype: what texts and images are encoded in; None: the best that its device has.
    """

    dtype: Dtype | None = None
    cache_bytes: int = Field(256 << 20, ge=0)


class HangConfig(BaseModel, frozen=True, extra="forbid"):
    """A step hangs when it takes factor times the median of its like, and least_s at least.

    first_s: where fewer than known_steps of its like are known.
    """

    factor: float = Field(3.0, gt=1)
    least_s: float = Field(5.0, gt=0)
    first_s: float = Field(600.0, gt=0)
    known_steps: int = Field(3, ge=1)


class DenoiserConfig(BaseModel, frozen=True, extra="forbid"):
    """How a group of ranks works; their number and places are its placement_group_bundles.

    degrees: how many ranks may share a request, None: as many as pays; a single one keeps every
    video the same to the bit, however busy the group is. checkpoint_s: the work that a kill may
    cost; checkpoint_steps: a checkpoint after so many steps at the latest. max_kills: a request
    during whose steps the group broke so often fails. form_timeout_s: for all ranks to start, load
    their weights and meet. model_memory_bytes: what the denoisers of the models that a rank holds
    at once may take, as stored; None: it holds all of the tier's.
    """

    degrees: tuple[int, ...] | None = None
    checkpoint_s: float = Field(30.0, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1)
    max_kills: int = Field(2, ge=1)
    form_timeout_s: float = Field(600.0, gt=0)
    model_memory_bytes: int | None = Field(None, ge=1)
    hang: HangConfig = HangConfig()
    scheduler: StepSchedulerConfig = StepSchedulerConfig()
    urgency: UrgencyConfig = UrgencyConfig()


class DecoderConfig(BaseModel, frozen=True, extra="forbid"):
    """Frames of more than tile_above_area pixels are decoded in tiles, by any free decoders of the
    tier, if the model's VAE is one that can; None: those that do not fit into the tier's `gpu` at
    once, and where that is not told none. chunks_at_once: how many decoders may
    share the frames of one that decodes a run of them at a time. tile_attempts: how often one tile
    or run may be lost.
    """

    tile_above_area: int | None = Field(None, ge=1)
    chunks_at_once: int = Field(1, ge=1)
    tile_attempts: int = Field(4, ge=1)


class GpuConfig(BaseModel, frozen=True, extra="forbid"):
    """One of the GPUs of a tier, and how many of them a denoiser's ranks have (the bundles of its
    placement group but the first). decoder_beside: whether a decoder is on one of them, too.
    """

    memory_bytes: int = Field(ge=1 << 20)
    count: int = Field(1, ge=1)
    decoder_beside: bool = True


class TierConfig(BaseModel, frozen=True, extra="forbid"):
    """One pool of denoisers and decoders.

    jobs_at_once: how many of the tier's jobs a pipeline replica drives at a time: as many as its
    denoisers hold (max_ongoing_requests), running and parked. express_at_once: how many more, of
    the plans that overtake (`denoiser.urgency.express_priority`), when all of those are taken.
    torch_threads: per process, CPU only. dtype: what its denoisers and decoders compute in,
    attention: with what its denoisers do; None: the best that their GPU has. gpu: what admission
    goes by; None: whatever is asked for is tried.
    larger: the tier that takes a job whose steps do not fit into this one's memory; None: it fails.
    scaling: how many replicas are wanted, within the bounds of the deployments'
    autoscaling_config. helps: smaller tiers whose jobs this one takes, too, if it is free and they
    have waited for helps_after_s, of the models that it serves at any size.
    """

    tier: GpuTier
    jobs_at_once: int = Field(2, ge=1)
    express_at_once: int = Field(1, ge=0)
    torch_threads: int | None = Field(None, ge=1)
    dtype: Dtype | None = None
    attention: Attention | None = None
    gpu: GpuConfig | None = None
    larger: GpuTier | None = None
    denoiser: DenoiserConfig = DenoiserConfig()
    decoder: DecoderConfig = DecoderConfig()
    scaling: PoolScaling = PoolScaling()
    helps: tuple[GpuTier, ...] = ()
    helps_after_s: float = Field(60.0, ge=0)

    @property
    def ranks(self) -> int:
        """Of a denoiser's replica, as far as is told: by `gpu`, else by `degrees`."""
        if self.gpu is not None:
            return self.gpu.count
        return max(self.denoiser.degrees or (1,))


class LimitsConfig(BaseModel, frozen=True, extra="forbid"):
    """What a request may weigh, whatever its plan.

    max_source_frames: of a video that is changed or gone on from. image: what decoding one takes.
    """

    max_prompt_chars: int = Field(4000, ge=1)
    max_body_bytes: int = Field(24 << 20, ge=1024)
    max_source_frames: int = Field(1200, ge=1)
    image: ImageLimits = ImageLimits()


class LeaseConfig(BaseModel, frozen=True, extra="forbid"):
    """A job whose lease is not extended for lease_s is taken by another pipeline replica.

    max_attempts: starts of one job before it fails and is refunded. max_age_s: a job that nobody
    is at work on so long after it was queued expires and is refunded. ageing_s: a job that has
    waited so long is taken as if its plan were one higher, so that none starves.
    """

    lease_s: float = Field(8.0, gt=0.5)
    poll_s: float = Field(0.1, gt=0)
    max_attempts: int = Field(4, ge=1)
    max_age_s: float = Field(86_400.0, gt=0)
    ageing_s: float = Field(600.0, gt=0)


class LocalAccountConfig(BaseModel, frozen=True, extra="forbid"):
    """The account that the first start makes, its key in a file that only its owner reads."""

    plan: Plan = Plan.ENTERPRISE
    credits: int = Field(1_000_000, ge=1)


class AppConfig(BaseModel, frozen=True, extra="forbid"):
    """`args` of the application in serve_config.yaml.

    request_rates: of each key of an account on that plan; a plan that is not named has no limit.
    """

    database_url_env: str = "DATABASE_URL"
    storage: LocalConfig = LocalConfig()
    models: list[ModelConfig] = Field(min_length=1)
    loras: list[LoraConfig] = []
    controls: list[ControlConfig] = []
    model_cache: Path | None = None
    operation: OperationConfig = OperationConfig()
    tiers: list[TierConfig] = Field(min_length=1)
    encoder: EncoderConfig = EncoderConfig()
    prices: PriceTable = PriceTable()
    work_weights: WorkWeights = WorkWeights()
    plans: PlanTable = PlanTable()
    request_rates: dict[Plan, RequestRate] = {}
    limits: LimitsConfig = LimitsConfig()
    leases: LeaseConfig = LeaseConfig()
    webhooks: WebhookConfig = WebhookConfig()
    image_urls: UrlGuardConfig = UrlGuardConfig()
    local_account: LocalAccountConfig | None = None

    @model_validator(mode="after")
    def _models_are_served_by_named_tiers(self) -> Self:
        named = {tier.tier for tier in self.tiers}
        for model in self.models:
            for served in model.served_on:
                if served.tier not in named:
                    raise ValueError(f"{model.path}: no tier {served.tier!r} is configured")
            tiers = [served.tier for served in model.served_on]
            if len(set(tiers)) < len(tiers):
                raise ValueError(f"{model.path}: served_on names a tier twice")
        return self

    @model_validator(mode="after")
    def _helped_tiers_are_others(self) -> Self:
        """And smaller ones: what a tier takes fits into it."""
        named = {tier.tier for tier in self.tiers}
        for tier in self.tiers:
            smaller = LADDER[: LADDER.index(tier.tier)] if tier.tier in LADDER else ()
            for helped in tier.helps:
                if helped not in named or helped not in smaller:
                    raise ValueError(f"tiers[].helps: {tier.tier} cannot help {helped!r}")
        return self

    @model_validator(mode="after")
    def _additions_have_names_of_their_own(self) -> Self:
        additions: dict[str, Sequence[LoraConfig | ControlConfig]] = {
            "loras": self.loras,
            "controls": self.controls,
        }
        for name, entries in additions.items():
            ids = [entry.id for entry in entries]
            for entry_id in ids:
                if ids.count(entry_id) > 1:
                    raise ValueError(f"{name}: two are called {entry_id!r}")
        return self

    @model_validator(mode="after")
    def _a_larger_tier_serves_the_same_models(self) -> Self:
        """And no circle of tiers hands a job round for ever."""
        larger = {tier.tier: tier.larger for tier in self.tiers if tier.larger is not None}
        for start in larger:
            passed = [start]
            while passed[-1] in larger:
                passed.append(larger[passed[-1]])
                if passed[-1] in passed[:-1]:
                    raise ValueError(f"tiers[].larger: {' -> '.join(passed)} goes round")
        for model in self.models:
            served_on = {served.tier for served in model.served_on}
            for tier in served_on & larger.keys():
                if larger[tier] not in served_on:
                    raise ValueError(f"{model.path}: not served on {larger[tier]}, {tier}'s larger")
        return self


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment adds to the configuration."""

    home: Path
    database_url: str
    storage: Path
    model_cache: Path


def read_settings(config: AppConfig) -> Settings:
    """Read MUTOSCOPE_HOME and the database's URL; touches no file.

    ValueError if a database that several nodes share lacks the secrets that they must share.
    """
    home = home_folder()
    url = os.environ.get(config.database_url_env) or f"sqlite:///{home / 'mutoscope.db'}"
    for name in ("MUTOSCOPE_PEPPER", "MUTOSCOPE_ADMIN_KEY"):
        _check_shared(url, name)
    storage = config.storage.directory or home / "storage"
    return Settings(home, url, storage, config.model_cache or home / "models")


def read_pepper(home: Path, database_url: str) -> bytes:
    """What API keys are hashed with: MUTOSCOPE_PEPPER, else a file that the first start makes."""
    given = _check_shared(database_url, "MUTOSCOPE_PEPPER")
    return (given or read_or_create_secret(home / "pepper", secrets.token_hex(32))).encode()


def read_admin_key(home: Path, database_url: str) -> str:
    """The operator's key: MUTOSCOPE_ADMIN_KEY, else a file that the first start makes."""
    given = _check_shared(database_url, "MUTOSCOPE_ADMIN_KEY")
    return given or read_or_create_secret(
        home / "admin_key", f"mk_admin_{secrets.token_urlsafe(32)}"
    )


def _check_shared(database_url: str, name: str) -> str | None:
    """The variable; ValueError if nodes that share a database would each make up its value."""
    given = os.environ.get(name)
    if not given and not database_url.startswith("sqlite"):
        raise ValueError(f"a shared database needs {name}, the same on every node")
    return given


def home_folder() -> Path:
    """MUTOSCOPE_HOME, by default ~/.mutoscope."""
    return Path(os.environ.get("MUTOSCOPE_HOME") or Path.home() / ".mutoscope").absolute()


def read_or_create_secret(path: Path, fresh: str) -> str:
    """The file's content; if there is none, write `fresh` into it, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(fresh)
    try:
        os.link(partial, path)  # whole or not at all, and never over an older one
    except FileExistsError:
        return path.read_text().strip()
    finally:
        partial.unlink()
    return fresh
