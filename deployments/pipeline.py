"""The stage that leases jobs and drives each through the other four, then settles it."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.handle import DeploymentHandle
from sqlalchemy.exc import OperationalError

from credits.ledger import AlreadySettled
from credits.pricing import WorkWeights
from deployments.checkpoints import CheckpointUnreadable
from deployments.config import LeaseConfig, TierConfig, read_pepper
from deployments.database import migrate, open_database, reader, retry_while_away, when_back
from deployments.errors import answer_for
from deployments.free_slots import FreeSlots
from deployments.held import HandedOver
from deployments.made import Made, note_times_of
from deployments.messages import Denoised, DenoiseWork, Encoded, Encoding, Published
from deployments.rank_group import GroupBroken
from deployments.scaling import Scaler
from deployments.settlement import Ending, WorkDone, cancellation, settle, work_told
from deployments.sweep import Sweeper
from deployments.webhooks import WebhookConfig, WebhookSender
from jobs.job import Job, JobId, JobState, Phase, Progress
from jobs.leases import extend_leases, move
from jobs.store import LeaseLost, cancelled_of, record
from media.object_store import ObjectStore
from models.catalog import Model
from models.memory import OutOfMemory
from models.request import VideoRequest

logger = logging.getLogger("ray.serve")

BACKOFF_S = 0.5
TEXT_WAS_THERE = "the work done is charged; what it is made from was encoded before"
T = TypeVar("T")
WORKER_LOST = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    GroupBroken,
    HandedOver,
    CheckpointUnreadable,
)


class VideoPipeline:
    """Each replica leases as many jobs of each tier as that tier may have at once.

    The database holds all that matters: a replica that dies loses its leases, and another one,
    or its successor, runs those jobs again.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it; the loops need its event loop
        self,
        database_url: str,
        store: ObjectStore,
        text_encoder: DeploymentHandle[Any],
        denoisers: dict[str, DeploymentHandle[Any]],
        media_encoder: DeploymentHandle[Any],
        tiers: list[TierConfig],
        leases: LeaseConfig,
        weights: WorkWeights,
        home: Path,
        webhooks: WebhookConfig,
        models: list[Model],
        at_any_size: dict[str, list[str]],
    ) -> None:
        """at_any_size: the models that each tier serves so."""
        self.engine = open_database(database_url)
        migrate(self.engine)
        self.store = store
        self.text_encoder = text_encoder
        self.denoisers: dict[str, Any] = {
            tier: handle.options(method_name="denoise", stream=True)
            for tier, handle in denoisers.items()
        }
        self.media_encoder: Any = media_encoder.options(method_name="encode_media", stream=True)
        self.tiers = tiers
        self.larger: dict[str, str] = {
            tier.tier: tier.larger for tier in tiers if tier.larger is not None
        }
        self.leases = leases
        self.weights = weights
        self.owner = uuid.uuid4().hex
        self.running: dict[JobId, asyncio.Task[None]] = {}
        self.tier_of: dict[JobId, str] = {}
        self.cancelled: set[JobId] = set()
        self.sweeper = Sweeper(self.engine, store, weights, leases, self.owner)
        self.webhooks = WebhookSender(self.engine, read_pepper(home, database_url), webhooks)
        self.scaler = Scaler(self.engine, models, tiers)
        self.slots = FreeSlots(self.engine, self.owner, tiers, leases, at_any_size)
        self.wanted = asyncio.Event()
        self.cancel_wanted = asyncio.Event()
        self.loops = [
            asyncio.create_task(loop)
            for loop in (
                self._lease_jobs(),
                self._extend_leases(),
                self._watch_cancellations(),
                self.sweeper.run(),
                self.webhooks.run(),
                self.scaler.run(),
            )
        ]

    def wake(self) -> None:
        """A job was queued or is to be cancelled: look now instead of at the next poll."""
        self.wanted.set()
        self.cancel_wanted.set()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the application's policy."""
        return self.scaler.stats()

    def explain_scaling(self) -> list[dict[str, Any]]:
        """What every pool has and is to have, and why."""
        return [decision.json() for decision in self.scaler.decisions]

    def check_health(self) -> None:
        """Fail, and so be replaced, if one of the loops has ended."""
        for loop in self.loops:
            if loop.done():
                logger.error("%s has ended", loop, exc_info=loop.exception())  # Serve tells no why
                raise RuntimeError(f"{loop} has ended")

    async def _lease_jobs(self) -> None:
        while True:
            self.wanted.clear()
            for job in await when_back(functools.partial(self.slots.fill, self.tier_of)):
                self.tier_of[job.id] = job.tier
                task = asyncio.create_task(self._run(job))
                task.add_done_callback(functools.partial(self._forget, job.id))
                self.running[job.id] = task
            await _wait(self.wanted, 10 * self.leases.poll_s)

    def _forget(self, job_id: JobId, task: "asyncio.Task[None]") -> None:
        """Also runs for a task that was cancelled before its first step."""
        if self.running.get(job_id) is not task:
            return  # leased again already
        del self.running[job_id]
        self.tier_of.pop(job_id, None)
        self.cancelled.discard(job_id)
        self.wanted.set()

    async def _extend_leases(self) -> None:
        while True:
            await asyncio.sleep(self.leases.lease_s / 4)
            if expected := set(self.running):
                lost = expected - await when_back(functools.partial(self._extend, expected))
                for job_id in lost & self.running.keys():
                    self.running[job_id].cancel()

    def _extend(self, job_ids: set[JobId]) -> set[JobId]:
        with self.engine.begin() as connection:
            return extend_leases(connection, self.owner, job_ids, self._lease_ms())

    async def _watch_cancellations(self) -> None:
        while True:
            await _wait(self.cancel_wanted, self.leases.poll_s)
            self.cancel_wanted.clear()
            if self.running:
                for job_id in await when_back(self._read_cancellations):
                    if job_id in self.running and job_id not in self.cancelled:
                        self.cancelled.add(job_id)
                        self.running[job_id].cancel()

    def _read_cancellations(self) -> list[JobId]:
        with reader(self.engine).begin() as connection:
            return cancelled_of(connection, self.owner)

    def _lease_ms(self) -> int:
        return int(self.leases.lease_s * 1000)

    async def _run(self, job: Job) -> None:
        """Run one job to its end and settle it; a lost lease leaves it to its new holder."""
        try:
            await self._run_and_settle(job)
        except (LeaseLost, AlreadySettled):
            logger.warning("job %s: the lease is lost", job.id)
        except OperationalError:
            logger.exception("job %s: the database is away, the lease must be lost", job.id)

    async def _run_and_settle(self, job: Job) -> None:
        """Or queue it for the larger tier, if its steps do not fit into this one's memory."""
        done, made = WorkDone(), Made()
        try:
            ending = await self._run_to_ending(job, done, made)
        except OutOfMemory as error:
            tier = self.larger[job.tier]
            logger.warning("job %s goes to tier %s: %s", job.id, tier, error)
            await self._while_held(functools.partial(self._move, job.id, tier))
        else:
            await self._while_held(functools.partial(self._settle, job, done, ending))
            await asyncio.to_thread(note_times_of, self.engine, job, made)

    def _move(self, job_id: JobId, tier: str) -> None:
        with self.engine.begin() as connection:
            move(connection, job_id, self.owner, tier)

    def _settle(self, job: Job, done: WorkDone, ending: Ending) -> None:
        settle(
            self.engine,
            self.store,
            self.weights,
            job,
            lease_owner=self.owner,
            done=done,
            ending=ending,
        )

    async def _run_to_ending(self, job: Job, done: WorkDone, made: Made) -> Ending:
        """Start the stages over while workers are lost; any other fault ends the job.

        OutOfMemory if a larger tier is to run it.
        """
        await self._recall(job, done)
        if job.cancel_requested or job.id in self.cancelled:
            return cancellation()
        lost = again = 0
        while job.attempt + lost <= self.leases.max_attempts:
            try:
                await asyncio.sleep(again * BACKOFF_S)
                return await self._run_stages(job, done, made)
            except asyncio.CancelledError:
                if job.id in self.cancelled:
                    return cancellation()
                raise LeaseLost(job.id) from None
            except (LeaseLost, OperationalError):
                raise
            except OutOfMemory as error:
                if job.tier in self.larger:
                    raise
                return _failure(answer_for(error).code)
            except WORKER_LOST as error:
                logger.warning("job %s, attempt %d: %s", job.id, job.attempt + lost, error)
                again += 1
                lost += not isinstance(error, HandedOver)  # with that one nothing is lost
            except Exception as error:
                logger.exception("job %s failed", job.id)
                return _failure(answer_for(error).code)
        return _failure("worker_lost")

    async def _recall(self, job: Job, done: WorkDone) -> None:
        """What its earlier leases did; LeaseLost."""
        if job.attempt == 1:
            return
        try:
            told = await self._while_held(functools.partial(work_told, self.engine, job))
        except asyncio.CancelledError:
            if job.id not in self.cancelled:
                raise LeaseLost(job.id) from None
        else:
            done.reach(**dataclasses.asdict(told))

    async def _run_stages(self, job: Job, done: WorkDone, made: Made) -> Ending:
        """From the latents on, if a lost worker had them already."""
        request = VideoRequest.model_validate(job.request)
        if made.denoised is None:
            await self._denoise(job, request, done, made)
        denoised, made.denoised = made.denoised, None
        try:
            published = await self._publish(job, request, denoised, done)
        except RayActorError:
            made.denoised = denoised  # an encoder or a decoder died, the latents did not
            raise
        seconds = made.seconds | {"decode": published.decode_s, "media": published.media_s}
        made.decode_s = published.decode_s
        return Ending(
            JobState.SUCCEEDED,
            "the work done is charged" if done.text else TEXT_WAS_THERE,
            charge_work=True,
            video_key=published.key,
            size_bytes=published.size_bytes,
            result={
                "stage_seconds": {name: round(s, 3) for name, s in seconds.items()},
                "warnings": made.warnings,
                "skipped_passes": done.skipped,
            },
        )

    async def _denoise(self, job: Job, request: VideoRequest, done: WorkDone, made: Made) -> None:
        started_s = time.monotonic()
        await self._record(job, Phase.TEXT, done)
        encoded: Encoded = await self.text_encoder.encode_text.remote(request)
        if encoded.made:
            done.reach(text=1)
            await self._record(job, Phase.TEXT, done, step=1, num_steps=1)
        made.warnings = []
        if encoded.num_tokens > encoded.max_tokens:
            made.warnings.append(
                f"the prompt has {encoded.num_tokens} tokens; "
                f"only the first {encoded.max_tokens} were used"
            )
        encoded_s = time.monotonic()

        await self._record(job, Phase.DENOISE, done, num_steps=request.num_steps)
        denoised: Denoised | None = None
        queued_s = max(0.0, time.time() - job.created_at_ms / 1000)
        work = DenoiseWork(job.id, job.priority, queued_s, request, lease=job.attempt)
        handle = self.denoisers[job.tier].options(multiplexed_model_id=request.model)
        steps = handle.remote(work, encoded.conditioning)
        async with _cancelled_on_exit(steps):
            async for denoised in steps:
                done.reach(denoise=denoised.num_made, skipped=denoised.skipped)
                if denoised.step_s is not None:
                    made.step_s[denoised.degree].append(denoised.step_s)
                await self._record(
                    job,
                    Phase.DENOISE,
                    done,
                    step=denoised.step,
                    num_steps=denoised.num_steps,
                )
        made.denoised = denoised
        made.seconds = {"text": encoded_s - started_s, "denoise": time.monotonic() - encoded_s}

    async def _publish(
        self, job: Job, request: VideoRequest, denoised: Denoised | None, done: WorkDone
    ) -> Published:
        """Decode, encode and store, while the frames stream past this process."""
        moments = self.media_encoder.remote(job.id, job.tier, request, denoised)
        async with _cancelled_on_exit(moments):
            moment: Encoding | Published
            async for moment in moments:
                if isinstance(moment, Published):
                    done.reach(media=1)
                    return moment
                done.reach(decode=moment.frame)
                await self._record(
                    job, Phase.DECODE, done, frame=moment.frame, num_frames=moment.num_frames
                )
        raise RuntimeError("the media encoder ended without publishing")

    async def _record(self, job: Job, phase: Phase, done: WorkDone, **counts: int) -> None:
        share = done.came(VideoRequest.model_validate(job.request), self.weights)
        percentage = min(int(100 * share), 99)
        progress = Progress(phase, percentage, skipped=done.skipped, **counts)
        await self._while_held(functools.partial(self._record_now, job.id, progress))

    async def _while_held(self, act: Callable[[], T]) -> T:
        """The database may be away for as long as a lease lasts; then the job is another's."""
        return await retry_while_away(act, for_s=self.leases.lease_s)

    def _record_now(self, job_id: JobId, progress: Progress) -> None:
        with self.engine.begin() as connection:
            record(connection, job_id, self.owner, progress)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set or the time is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


@contextlib.asynccontextmanager
async def _cancelled_on_exit(stream: Any) -> AsyncIterator[None]:
    """Stop a stage's stream when its consumer leaves; a stream that has ended ignores it."""
    try:
        yield
    finally:
        stream.cancel()


def _failure(code: str) -> Ending:
    return Ending(
        JobState.FAILED,
        "failed by our fault: all is refunded",
        charge_work=False,
        error_code=code,
        error_message="The video could not be made; the credits are refunded.",
    )
