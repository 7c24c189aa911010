"""Admission: plan, quote, reservation and job in one transaction, or none of them."""

import uuid
from dataclasses import dataclass

from sqlalchemy import Engine

from autoscaling.tiers import ServedOn, choose_tier
from credits.accounts import Account, AccountId, find_account
from credits.ledger import reserve
from credits.plans import PlanTable, TooManyJobs, check_plan
from credits.pricing import PriceTable, Quote, quote
from jobs.job import Job, JobId
from jobs.store import count_open, enqueue
from media.object_store import ObjectStore
from models.catalog import Model, ModelNotFound
from models.request import VideoRequest


@dataclass(frozen=True, slots=True)
class Offer:
    """A deployed model and the tiers that serve it."""

    model: Model
    served_on: tuple[ServedOn, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """The tables and stores that admitting a request needs."""

    engine: Engine
    store: ObjectStore
    offers: dict[str, Offer]
    prices: PriceTable
    plans: PlanTable

    def offer(self, model_id: str | None) -> Offer:
        """The named model, or the only or first one; ModelNotFound."""
        if model_id is None:
            return next(iter(self.offers.values()))
        if model_id not in self.offers:
            raise ModelNotFound(model_id)
        return self.offers[model_id]

    def quote(self, request: VideoRequest) -> Quote:
        """The price of the frames and the size that are asked for."""
        return quote(
            self.prices,
            request.family,
            num_frames=request.num_frames,
            width=request.width,
            height=request.height,
        )

    def admit(self, account: Account, request: VideoRequest, start_image: bytes | None) -> Job:
        """Refuse, or store the start image, reserve the price and queue the job."""
        offer = self.offer(request.model)
        limits = self.plans.limits[account.plan]
        job_id = JobId(f"video_{uuid.uuid4().hex}")
        if start_image is not None:
            request = request.model_copy(update={"start_image": f"inputs/{job_id}"})
        check_plan(account.plan, limits, request, offer.model.frame_stride)
        tier = choose_tier(offer.served_on, account.plan, request)
        price = self.quote(request)
        if start_image is not None:
            self.store.put(f"inputs/{job_id}", start_image)
        try:
            return self._enqueue(account.id, job_id, request, price, tier, limits.priority)
        except BaseException:
            self.store.delete(f"inputs/{job_id}")
            raise

    def _enqueue(
        self,
        account_id: AccountId,
        job_id: JobId,
        request: VideoRequest,
        price: Quote,
        tier: str,
        priority: int,
    ) -> Job:
        with self.engine.begin() as connection:
            account = find_account(connection, account_id)
            assert account is not None
            max_jobs = account.max_jobs
            if max_jobs is None:
                max_jobs = self.plans.limits[account.plan].max_jobs
            if count_open(connection, account.id) >= max_jobs:
                raise TooManyJobs(max_jobs)
            return enqueue(
                connection,
                {
                    "id": job_id,
                    "account_id": account.id,
                    "model": request.model,
                    "tier": tier,
                    "priority": priority,
                    "request": request.model_dump(mode="json"),
                    "quoted": price.credits,
                    "quote_exact": str(price.exact),
                    "reservation_id": reserve(connection, account.id, price.credits),
                },
            )
