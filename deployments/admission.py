"""Admission: plan, quote, reservation and job in one transaction, or none of them."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from autoscaling.tiers import ServedOn, choose_tier
from credits.accounts import Account, AccountDisabled
from credits.ledger import new_reservation_id, reserve
from credits.plans import PlanTable, check_may_derive, check_plan
from credits.pricing import PriceTable, Quote, quote
from deployments.database import lock_until_commit, reader
from deployments.idempotency import Attempt
from jobs.job import Job, JobId
from jobs.store import enqueue
from media.encode import estimate_bytes
from media.object_store import ObjectStore
from models.catalog import Model, ModelNotFound
from models.request import VideoRequest

# What a job reads besides its row, by the field of VideoRequest that names where it lies.
Inputs = Mapping[str, bytes]
NO_INPUTS: Inputs = MappingProxyType({})


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
            num_frames=request.new_frames,
            width=request.width,
            height=request.height,
        )

    def find_first(self, account: Account, attempt: Attempt) -> Job | None:
        """The job that an earlier sending of the same request made; IdempotencyConflict."""
        with reader(self.engine).begin() as connection:
            return attempt.find_first(connection, account.id)

    def check(self, account: Account, request: VideoRequest) -> str:
        """The tier that would make it; AccountDisabled, PlanForbids."""
        if account.disabled:
            raise AccountDisabled(account.id)
        offer = self.offer(request.model)
        limits = self.plans.limits[account.plan]
        check_plan(account.plan, limits, request, offer.model.frame_stride)
        return choose_tier(offer.served_on, account.plan, request)

    def find_model(self, model_id: str) -> Model | None:
        """The model of that name, if it is still deployed."""
        offer = self.offers.get(model_id)
        return None if offer is None else offer.model

    def check_may_derive(self, account: Account) -> None:
        """AccountDisabled or PlanForbids, before a video is decoded that is of no use."""
        if account.disabled:
            raise AccountDisabled(account.id)
        check_may_derive(account.plan, self.plans.limits[account.plan])

    def admit(
        self,
        account: Account,
        request: VideoRequest,
        inputs: Inputs = NO_INPUTS,
        attempt: Attempt | None = None,
    ) -> Job:
        """Refuse, or store the inputs, reserve the price and queue the job.

        An attempt that is made twice at once is answered with the one job of both; whether it was
        made long before, the caller has asked (`find_first`).
        """
        job_id = JobId(f"video_{uuid.uuid4().hex}")
        keys = {name: _input_key(job_id, name) for name in inputs}
        request = request.model_copy(update=keys)
        tier = self.check(account, request)
        try:
            for name, content in inputs.items():
                self.store.put(keys[name], content)
            return self._enqueue(account, job_id, request, tier, attempt)
        except BaseException as error:
            for key in keys.values():
                self.store.delete(key)
            # The same attempt, sent twice at once, has won meanwhile.
            if isinstance(error, IntegrityError) and attempt is not None:
                first = self.find_first(account, attempt)
                if first is not None:
                    return first
            raise

    def _enqueue(
        self,
        account: Account,
        job_id: JobId,
        request: VideoRequest,
        tier: str,
        attempt: Attempt | None,
    ) -> Job:
        price = self.quote(request)
        limits = self.plans.limits[account.plan]
        num_bytes = _estimate_bytes(request)
        reservation_id = new_reservation_id()
        max_jobs = limits.max_jobs if account.max_jobs is None else account.max_jobs
        with self.engine.begin() as connection:
            if attempt is not None and attempt.key is None:
                # A retry waits for the attempt that it repeats, and then sees what that one made.
                lock_until_commit(connection, f"{account.id} {attempt.fields_hash}")
                if (first := attempt.find_first(connection, account.id)) is not None:
                    return first
            job = enqueue(
                connection,
                {
                    "id": job_id,
                    "account_id": account.id,
                    "model": request.model,
                    "tier": tier,
                    "priority": limits.priority,
                    "request": request.model_dump(mode="json"),
                    "quoted": price.credits,
                    "quote_exact": str(price.exact),
                    "reservation_id": reservation_id,
                    "idempotency_key": None if attempt is None else attempt.key,
                    "estimated_bytes": num_bytes,
                    "fields_hash": None if attempt is None else attempt.fields_hash,
                },
            )
            reserve(
                connection,
                account.id,
                reservation_id,
                price.credits,
                max_open=max_jobs,
                num_bytes=num_bytes,
                max_bytes=limits.max_stored_bytes,
            )
        return job


def _input_key(job_id: JobId, name: str) -> str:
    return f"inputs/{job_id}" if name == "start_image" else f"inputs/{job_id}.{name}"


def _estimate_bytes(request: VideoRequest) -> int:
    return estimate_bytes(request.total_frames, request.width, request.height)
