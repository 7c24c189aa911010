"""Asks the job table how much is wanted, and says how many replicas the pools are to have."""

import asyncio
import functools
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import metrics
from sqlalchemy import Engine

from autoscaling.demand import SMOOTH_S, PoolDemand, measure_demand
from autoscaling.policy import WANTED
from autoscaling.pool_scaling import Reason, Wanted, wanted_decoders, wanted_denoisers
from autoscaling.stage_costs import StageCosts, TierGpus
from autoscaling.tiers import GpuTier
from deployments.config import TierConfig
from deployments.database import reader, when_back
from jobs.demand import JobGroup, arrived_groups, open_groups
from jobs.stage_times import read_times
from models.catalog import Model

logger = logging.getLogger("ray.serve")

# A table of very many jobs is counted less often: for a tenth of the time at most.
PERIOD_S, SELDOM = 2.0, 10
USUAL_EVERY_S = 60.0
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What a deployment has and is to have. coming: replicas that were started and do not work yet.

    demand: of its tier's denoisers.
    """

    deployment: str
    tier: GpuTier
    ready: int
    coming: int
    wanted: Wanted
    demand: PoolDemand

    def json(self) -> dict[str, Any]:
        """For the operator."""
        return {
            "deployment": self.deployment,
            "tier": str(self.tier),
            "ready": self.ready,
            "coming": self.coming,
            "wanted": self.wanted.replicas,
            "reason": str(self.wanted.reason),
            "why": self.wanted.why,
            "queued_gpu_seconds": round(self.demand.queued_s, 3),
            "running_gpu_seconds": round(self.demand.running_s, 3),
            "arriving_gpu_seconds_per_second": round(self.demand.per_s, 4),
        }


class Pool:
    """The replicas of one deployment, as Serve counts them, and since when some are coming."""

    def __init__(self) -> None:
        self.ready = 0
        self.began_s: list[float] = []

    def count(self, ready: int, coming: int, now_s: float) -> None:
        """Those that began first are ready first."""
        self.ready = ready
        self.began_s = self.began_s[max(0, len(self.began_s) - coming) :]
        self.began_s += [now_s] * (coming - len(self.began_s))

    def coming_s(self, cold_start_s: float, now_s: float) -> list[float]:
        """In how many seconds each that is coming is expected to work."""
        return [max(0.0, began_s + cold_start_s - now_s) for began_s in self.began_s]


class Scaler:
    """Works out, again and again, what the pools are to have; whoever does so finds the same."""

    def __init__(self, engine: Engine, models: list[Model], tiers: list[TierConfig]) -> None:
        self.engine = engine
        self.models = {model.id: model for model in models}
        self.tiers = tiers
        self.pools: dict[str, Pool] = defaultdict(Pool)
        self.decisions: list[Decision] = []
        self.usual: dict[GpuTier, list[list[JobGroup]]] = {}
        self.usual_read_s = -USUAL_EVERY_S
        self.replicas = metrics.Gauge(
            "mutoscope_replicas",
            "Replicas of a pool: those that work, are coming, and are wanted, and why.",
            tag_keys=("pool", "kind", "reason"),  # type: ignore[arg-type]  # Ray says tuple[str]
        )
        self.gpu_seconds = metrics.Gauge(
            "mutoscope_demand_gpu_seconds",
            "Denoising that is queued or running.",
            tag_keys=("tier", "kind"),  # type: ignore[arg-type]
        )

    async def run(self) -> None:
        """For ever."""
        application = serve.get_replica_context().app_name
        pause_s = PERIOD_S
        while True:
            try:
                await asyncio.to_thread(self._count, application)
            except RayError as error:  # Serve's controller begins anew
                logger.warning("replicas are not counted: %s", error)
            else:
                began_s = time.monotonic()
                self.decisions = await when_back(self._decide)
                self._tell()
                pause_s = max(PERIOD_S, SELDOM * (time.monotonic() - began_s))
            await asyncio.sleep(pause_s)

    def stats(self) -> dict[str, float]:
        """What `autoscaling.policy.ByDemand` reads."""
        return {
            WANTED + decision.deployment: float(decision.wanted.replicas)
            for decision in self.decisions
        }

    def _count(self, application: str) -> None:
        now_s = time.monotonic()
        found = serve.status().applications.get(application)
        for name, deployment in ({} if found is None else found.deployments).items():
            states: Mapping[Any, int] = deployment.replica_states  # by name, whatever its type says
            ready = states.get("RUNNING", 0) + states.get("PENDING_MIGRATION", 0)
            coming = states.get("STARTING", 0) + states.get("UPDATING", 0)
            self.pools[name].count(ready, coming, now_s)

    def _decide(self) -> list[Decision]:
        with reader(self.engine).begin() as connection:
            groups = open_groups(connection)
            arrived = arrived_groups(connection, 3 * SMOOTH_S, 0.0)
            costs = StageCosts(self.models, read_times(connection))
        self._read_usual()
        decisions: list[Decision] = []
        for tier in self.tiers:
            decisions += self._decide_tier(tier, groups, arrived, costs)
        return decisions

    def _decide_tier(
        self,
        tier: TierConfig,
        groups: Sequence[JobGroup],
        arrived: Sequence[JobGroup],
        costs: StageCosts,
    ) -> list[Decision]:
        gpus = TierGpus(tier.tier, tier.ranks)
        config = tier.scaling
        demand = measure_demand(
            gpus,
            groups,
            arrived,
            self.usual.get(tier.tier, []),
            costs,
            tier.denoiser.urgency,
            config.horizon,
        )
        decide = functools.partial(self._decision, tier, demand)
        name = f"Denoiser-{tier.tier}"
        pool = self.pools[name]
        coming_s = pool.coming_s(config.cold_start_s, time.monotonic())
        denoisers = wanted_denoisers(demand, gpus.count, pool.ready, coming_s, config)
        decoders = wanted_decoders(demand, gpus.count, denoisers.replicas, config)
        return [decide(name, denoisers), decide(f"VaeDecoder-{tier.tier}", decoders)]

    def _decision(
        self, tier: TierConfig, demand: PoolDemand, name: str, wanted: Wanted
    ) -> Decision:
        pool = self.pools[name]
        return Decision(name, tier.tier, pool.ready, len(pool.began_s), wanted, demand)

    def _read_usual(self) -> None:
        """What came when a replica that is asked for now would be there, on the days before."""
        now_s = time.monotonic()
        if now_s - self.usual_read_s < USUAL_EVERY_S:
            return
        self.usual_read_s = now_s
        with reader(self.engine).begin() as connection:
            for tier in self.tiers:
                middle_s = -tier.scaling.cold_start_s
                windows = [
                    (day * DAY_S + middle_s + SMOOTH_S / 2, day * DAY_S + middle_s - SMOOTH_S / 2)
                    for day in range(1, tier.scaling.usual_days + 1)
                ]
                self.usual[tier.tier] = [
                    arrived_groups(connection, from_s, until_s) for from_s, until_s in windows
                ]

    def _tell(self) -> None:
        """On Ray's metrics port."""
        for decision in self.decisions:
            wanted = decision.wanted
            counts = [("ready", decision.ready, ""), ("coming", decision.coming, "")]
            # Of every reason: a gauge keeps what it was told of one that is no longer it.
            for cause in Reason:
                replicas = wanted.replicas if cause is wanted.reason else 0
                counts.append(("wanted", replicas, str(cause)))
            for kind, count, reason in counts:
                tags = {"pool": decision.deployment, "kind": kind, "reason": reason}
                self.replicas.set(count, tags)
            demand = decision.demand
            for kind, seconds in (("queued", demand.queued_s), ("running", demand.running_s)):
                self.gpu_seconds.set(seconds, {"tier": str(decision.tier), "kind": kind})
