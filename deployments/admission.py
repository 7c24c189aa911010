"""Admission: plan, quote, reservation and job in one transaction, or none of them."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Engine, String, bindparam
from sqlalchemy.exc import IntegrityError

from autoscaling.room import Room, TierRoom
from autoscaling.tiers import GpuTier, ServedOn, choose_tier
from credits.accounts import Account, AccountDisabled
from credits.ledger import (
    Hold,
    InsufficientCredits,
    new_reservation_id,
    reservation_statement,
    reserve,
    reserve_with,
)
from credits.plans import Plan, PlanTable, StorageFull, TooManyJobs, check_may_derive, check_plan
from credits.pricing import PriceTable, Quote, quote
from deployments.database import lock_statement, lock_until_commit, reader, writer_at_once
from deployments.idempotency import Attempt
from jobs.enqueue import enqueue, enqueue_parameters, enqueue_statement, queued_job
from jobs.job import Job, JobId
from media.encode import estimate_bytes
from media.object_store import ObjectStore
from models.catalog import Model, ModelNotFound
from models.cost import VideoShape
from models.request import VideoRequest

# What a job reads besides its row, by the field of VideoRequest that names where it lies.
Inputs = Mapping[str, bytes]
NO_INPUTS: Inputs = MappingProxyType({})
# After these nothing was written. An attempt is refused so, too, when the same one was first: its
# key is taken, or it has used up what the account may have.
REFUSALS = (IntegrityError, AccountDisabled, StorageFull, TooManyJobs, InsufficientCredits)


@dataclass(frozen=True, slots=True)
class Offer:
    """A deployed model, the tiers that serve it, why, if its manifest's licence forbids it, and the
    memory that these tiers have.
    """

    model: Model
    served_on: tuple[ServedOn, ...]
    licence_override: str | None = None
    room: Mapping[GpuTier, TierRoom] = field(default_factory=dict)

    def choose_tier(self, plan: Plan, request: VideoRequest) -> GpuTier:
        """The first that takes it; PlanForbids, InvalidRequest."""
        room = Room(self.model, self.room)
        takers = [served for served in self.served_on if room.fits(request, served)]
        if not takers:
            raise room.refuse(request, self.served_on)
        return choose_tier(tuple(takers), plan, request)


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
        check_plan(account.plan, limits, request, offer.model.spec.frame_stride)
        return offer.choose_tier(account.plan, request)

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
            job = self._enqueue(account, job_id, request, tier, attempt)
            if job.id != job_id:
                self._delete(keys)
            return job
        except REFUSALS:
            # After any other error the job may be there: its COMMIT may have been done although
            # nobody was told. What is then left of no job, the sweep deletes.
            self._delete(keys)
            # The same attempt, sent twice at once, may have won meanwhile.
            if attempt is not None:
                first = self.find_first(account, attempt)
                if first is not None:
                    return first
            raise

    def _delete(self, keys: dict[str, str]) -> None:
        for key in keys.values():
            self.store.delete(key)

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
        values: dict[str, Any] = {
            "id": job_id,
            "account_id": account.id,
            "model": request.model,
            "tier": tier,
            "priority": limits.priority,
            "request": request.model_dump(mode="json"),
            "quoted": price.credits,
            "quote_exact": str(price.exact),
            "reservation_id": new_reservation_id(),
            "idempotency_key": None if attempt is None else attempt.key,
            "fields_hash": None if attempt is None else attempt.fields_hash,
            "estimated_bytes": _estimate_bytes(request),
            "kept_ms": limits.kept_ms,
            "made_by_retry": attempt is not None and attempt.key is None and attempt.is_retry,
            "shape": str(VideoShape.of(request)),
            "num_steps": request.last_step - request.first_step,
        }
        hold = Hold(
            account.id,
            values["reservation_id"],
            price.credits,
            max_open=limits.max_jobs if account.max_jobs is None else account.max_jobs,
            num_bytes=values["estimated_bytes"],
            max_bytes=limits.max_stored_bytes,
        )
        turn = f"{account.id} {values['fields_hash']}"
        if not values["made_by_retry"]:
            with writer_at_once(self.engine).begin() as connection:
                # Asked here, since a connection may have been waited for.
                if attempt is None or not attempt.may_be_overtaken:
                    return _write(connection, values, hold, turn)
        assert attempt is not None
        with self.engine.begin() as connection:
            # A retry waits for the attempt that it repeats, and then sees what that one made; so
            # does an attempt that a later one may have overtaken.
            lock_until_commit(connection, turn)
            made = attempt.find_first(connection, account.id)
            made = made or attempt.find_retry(connection, account.id)
            return _write(connection, values, hold, turn) if made is None else made


# On PostgreSQL all of it is one statement, which needs no transaction round it. It waits for its
# turn before it touches the account's row.
_ADMIT = reservation_statement(enqueue_statement, lock_statement(bindparam("turn", type_=String())))


def _write(connection: Connection, values: dict[str, Any], hold: Hold, turn: str) -> Job:
    """Job, first event and reservation; the account is touched last."""
    if connection.dialect.name == "postgresql":
        parameters = {**enqueue_parameters(values), "turn": turn}
        given = reserve_with(connection, hold, _ADMIT, parameters)
        return queued_job(given, values)
    job = enqueue(connection, values)
    reserve(connection, hold)
    return job


def _input_key(job_id: JobId, name: str) -> str:
    return f"inputs/{job_id}" if name == "start_image" else f"inputs/{job_id}.{name}"


def _estimate_bytes(request: VideoRequest) -> int:
    return estimate_bytes(request.total_frames, request.width, request.height)
