"""Our nouns as the JSON of the HTTP API."""

from datetime import UTC, datetime
from typing import Any

from credits.accounts import Account
from credits.api_keys import ApiKey
from credits.audit import AuditEntry
from credits.ledger import LedgerEntry
from credits.plans import PlanTable
from deployments.admission import Offer
from deployments.estimate import Estimate
from jobs.job import Job, JobEvent, JobState
from jobs.outbox import Delivery
from jobs.webhooks import Endpoint
from models.catalog import Model
from models.families import SVD_FAMILIES, WITHOUT_PROMPT
from models.probe import FAMILY_BASES, ModelType
from models.request import VideoRequest, read_stored

STATUSES = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",
}


POLL_AFTER_MS = "500"
MAX_ASPECT_CHANGE = 0.1
ENTRY_COLUMNS = (
    "number", "created_at", "kind", "amount", "debit", "credit", "reservation_id", "video_id",
)  # fmt: skip


def video_json(job: Job, model: Model | None) -> dict[str, Any]:
    """The Video object of the Videos API, with what else we know of the job.

    A cancelled job has status "failed" and error.code "cancelled": the API has four statuses.
    model None (deployed no more) leaves out what is generated before trimming.
    """
    request = read_stored(job.request)
    result = job.result or {}
    error = None
    if job.error_code is not None:
        error = {"code": job.error_code, "message": job.error_message}
    video = {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": STATUSES[job.state],
        "progress": job.percentage,
        "created_at": job.created_at_ms // 1000,
        "completed_at": _seconds(job.finished_at_ms),
        "expires_at": _seconds(job.expires_at_ms),
        "seconds": f"{request.total_frames / request.fps:g}",
        "size": f"{request.width}x{request.height}",
        "remixed_from_video_id": request.remixed_from,
        "error": error,
        "state": job.state,
        **request.model_dump(
            include={"prompt", "negative_prompt", "num_frames", "fps", "f_patch_size"}
            | {"num_steps", "guidance_scale", "flow_shift", "motion_strength", "strength"}
            | {"min_guidance_scale", "motion_bucket_id", "noise_aug_strength", "true_cfg_scale"}
            | {"scheduler", "loras", "control", "regions", "seed_variance"}
            | {"denoising_start", "denoising_end", "step_cache", "cfg_skip_ratio", "free_noise"}
            | {"seed", "tags", "user"},
            warnings=False,  # of what a newer version may have written
        ),
        "total_frames": request.total_frames,
        "image_to_video": request.start_image is not None,
        "quoted": job.quoted,
        "charged": job.charged,
        "refunded": job.refunded,
        "reason": job.reason,
        "stage_seconds": result.get("stage_seconds", {}),
        "warnings": [*request_warnings(request), *result.get("warnings", [])],
        "size_bytes": job.size_bytes,
        "passes": {
            "planned": request.planned_passes,
            "skipped": result.get("skipped_passes"),
        },
    }
    if model is None:
        return video
    generated, measured = generated_json(model, request), model.manifest.measured_skipping(request)
    quality = None if measured is None else measured.model_dump(include={"psnr_db", "min_psnr_db"})
    return {**video, "generated": generated, "skipping_measured": quality}


def request_warnings(request: VideoRequest) -> list[str]:
    """What of the request is done otherwise than its author may have thought."""
    warnings = []
    aspect = request.start_image_aspect
    if aspect is not None:
        change = aspect / (request.width / request.height)
        if max(change, 1 / change) > 1 + MAX_ASPECT_CHANGE:
            warnings.append(
                f"the start image's aspect ({aspect:.2f}) differs from the video's "
                f"({request.width / request.height:.2f}): its edges are cut off"
            )
    if request.motion_strength is not None and request.family not in SVD_FAMILIES:
        warnings.append(f"motion_strength has no effect on {request.family}")
    if request.negative_prompt and not request.guided:
        warnings.append("negative_prompt has no effect without guidance")
    if request.prompt and request.family in WITHOUT_PROMPT:
        warnings.append(f"prompt has no effect on {request.family}")
    return warnings


def generated_json(model: Model, request: VideoRequest) -> dict[str, Any]:
    """What is generated, from which what was asked is cut."""
    width, height = model.spec.generated_size(request.width, request.height)
    frames = model.spec.generated_frames(request.num_frames, request.f_patch_size)
    return {"num_frames": frames, "size": f"{width}x{height}"}


def event_json(event: JobEvent, job: Job) -> dict[str, Any]:
    """One moment of a job; eta_s supposes that the rest goes on as fast as what is done."""
    progress = event.progress
    eta_s = None
    if event.state is None and progress.percentage > 0 and job.started_at_ms is not None:
        elapsed_ms = event.created_at_ms - job.started_at_ms
        eta_s = round(elapsed_ms * (100 - progress.percentage) / progress.percentage / 1000, 1)
    url = {} if event.state is not JobState.SUCCEEDED else {"video_url": content_path(job.id)}
    return {
        **url,
        "seq": event.seq,
        "phase": progress.phase,
        "percentage": progress.percentage,
        "step": progress.step,
        "num_steps": progress.num_steps,
        "frame": progress.frame,
        "num_frames": progress.num_frames,
        "skipped_passes": progress.skipped,
        "eta_s": eta_s,
        "created_at_ms": event.created_at_ms,
    }


def content_path(job_id: str) -> str:
    """Where a finished video is downloaded."""
    return f"/v1/videos/{job_id}/content"


def model_json(offer: Offer, plans: PlanTable) -> dict[str, Any]:
    """An entry of GET /v1/models."""
    model, spec = offer.model, offer.model.spec
    manifest = model.manifest
    may_use = [plan for plan, limits in plans.limits.items() if manifest.family in limits.families]
    return {
        "id": model.id,
        "object": "model",
        "created": 0,
        "owned_by": "mutoscope",
        "type": ModelType.MAIN,
        "base": FAMILY_BASES[manifest.family],
        "family": manifest.family,
        "description": manifest.description,
        "trained": manifest.trained,
        "licence": {
            "name": manifest.licence,
            "commercial_use": manifest.commercial_use,
            "territory_exclusions": list(manifest.territory_exclusions),
            "override": offer.licence_override,
        },
        "plans": may_use,
        "inputs": {
            "prompt": manifest.family not in WITHOUT_PROMPT,
            "input_reference": model.start_image,
            "video": spec.source_video,
            "control": {
                kind: {"id": net.id, "frames": "some" if net.is_sparse else "all"}
                for net in model.controls[::-1]
                for kind in net.kinds
            },
        },
        "frames": {
            "min": manifest.min_frames,
            "max": model.max_frames,
            "max_with_free_noise": model.most_frames_windowed,
            "stride": spec.frame_stride,
        },
        "max_side": manifest.max_side,
        "max_area": manifest.max_area,
        "size_multiple": spec.size_multiple,
        "f_patch_sizes": list(spec.f_patch_sizes),
        "vae": manifest.vae,
        "loras": [lora.id for lora in model.loras],
        "defaults": manifest.defaults.model_dump(exclude_none=True),
    }


def quote_json(estimate: Estimate) -> dict[str, Any]:
    """A price with its factors."""
    price = estimate.quote
    return {
        "credits": price.credits,
        "factors": {
            "base": price.base,
            "num_frames": price.num_frames,
            "resolution_multiplier": float(price.resolution_multiplier),
            "model_multiplier": float(price.model_multiplier),
        },
        "model": estimate.model,
        "family": estimate.family,
        "deployed": estimate.deployed,
        "size": f"{estimate.width}x{estimate.height}",
        "num_frames": price.num_frames,
        "generated": {
            "num_frames": estimate.generated_frames,
            "size": f"{estimate.generated_width}x{estimate.generated_height}",
        },
    }


def credits_json(account: Account) -> dict[str, Any]:
    """What an account has."""
    return {
        "plan": account.plan,
        "available": account.available,
        "reserved": account.reserved,
        "spent": account.spent,
    }


def entry_json(entry: LedgerEntry, video_id: str | None) -> dict[str, Any]:
    """A transfer of credits, under ENTRY_COLUMNS' names; created_at is ISO 8601 in UTC."""
    return {
        "number": entry.number,
        "created_at": _iso(entry.created_at_ms),
        "kind": entry.kind,
        "amount": entry.amount,
        "debit": entry.debit,
        "credit": entry.credit,
        "reservation_id": entry.reservation_id,
        "video_id": video_id,
    }


def key_json(key: ApiKey) -> dict[str, Any]:
    """An API key without its secret; times in seconds since 1970, as the Videos API has them."""
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "hint": key.hint,
        "created_at": key.created_at_ms // 1000,
        "expires_at": _seconds(key.expires_at_ms),
        "revoked_at": _seconds(key.revoked_at_ms),
        "last_used_at": _seconds(key.last_used_at_ms),
    }


def account_json(account: Account) -> dict[str, Any]:
    """An account as the operator sees it."""
    return {
        "id": account.id,
        "object": "account",
        "name": account.name,
        **credits_json(account),
        "max_jobs": account.max_jobs,
        "open_jobs": account.open_reservations,
        "disabled": account.disabled,
        "created_at": account.created_at_ms // 1000,
    }


def job_json(job: Job) -> dict[str, Any]:
    """A job as the operator sees it: its money and where it stands, not what it shows."""
    return {
        "id": job.id,
        "object": "job",
        "state": job.state,
        "model": job.model,
        "tier": job.tier,
        "priority": job.priority,
        "attempt": job.attempt,
        "percentage": job.percentage,
        "quoted": job.quoted,
        "charged": job.charged,
        "refunded": job.refunded,
        "reason": job.reason,
        "error_code": job.error_code,
        "reservation_id": job.reservation_id,
        "created_at": job.created_at_ms // 1000,
        "finished_at": _seconds(job.finished_at_ms),
    }


def audit_json(entry: AuditEntry) -> dict[str, Any]:
    """An act in the audit log; created_at is ISO 8601 in UTC."""
    return {
        "number": entry.number,
        "created_at": _iso(entry.created_at_ms),
        "actor": entry.actor,
        "action": entry.action,
        "account_id": entry.account_id,
        "details": entry.details,
    }


def endpoint_json(endpoint: Endpoint, secret: str, *, show: bool = False) -> dict[str, Any]:
    """A webhook endpoint, its secret in full only if show."""
    shown = {"signing_secret": secret} if show else {}
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "created_at": endpoint.created_at_ms // 1000,
        "updated_at": endpoint.updated_at_ms // 1000,
        "signing_secret_hint": f"{secret[:10]}...",
        **shown,
    }


def delivery_json(delivery: Delivery) -> dict[str, Any]:
    """What was, or is to be, told to a webhook endpoint."""
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": delivery.endpoint_id,
        "video_id": delivery.job_id,
        "type": delivery.event_type,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "last_error": delivery.last_error,
        "created_at": delivery.created_at_ms // 1000,
    }


def _seconds(time_ms: int | None) -> int | None:
    return None if time_ms is None else time_ms // 1000


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
