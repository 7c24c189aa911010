"""One table from exception to HTTP answer; the class decides, its nearest ancestor if need be."""

import math
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from credits.accounts import AccountDisabled, AccountNotFound
from credits.api_keys import KeyNotFound, Unauthenticated
from credits.ledger import AlreadySettled, InsufficientCredits
from credits.plans import PlanForbids, StorageFull, TooManyJobs
from credits.rates import RateLimited
from deployments.checkpoints import CheckpointUnreadable
from deployments.held import HandedOver, RequestQuarantined
from deployments.origin import ForeignPackage
from deployments.rank_group import GroupBroken, SeatsUneven
from deployments.resident_models import ModelTooLarge
from deployments.url_guard import UrlRefused
from jobs.outbox import DeliveryNotFound
from jobs.store import IdempotencyConflict, JobNotFound, LeaseLost
from jobs.webhooks import EndpointNotFound
from media.decode import VideoUnreadable
from media.encode import MediaEncodingFailed
from media.object_store import ObjectNotFound
from models.catalog import ModelNotFound
from models.checkpoint import CheckpointUnusable
from models.compute import ComputeUnavailable, FirstBlockOnly, StepAbandoned
from models.control import ControlDoesNotFit
from models.licence import LicenceForbids
from models.lora import LoraDoesNotFit
from models.memory import OutOfMemory
from models.probe import NotRecognised
from models.request import InvalidRequest, NotSupported
from models.source import SourceUnavailable
from models.spec import WeightsDamaged, WeightsMissing


class InputTooLarge(Exception):
    """The body is longer than any request needs to be."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"the request body is limited to {self.max_bytes} bytes"


class VideoNotReady(Exception):
    """The video has no content: it is not finished, or never will be."""

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(job_id, state)
        self.job_id, self.state = job_id, state

    def __str__(self) -> str:
        return f"video {self.job_id} has no content: it is {self.state}"


class VideoFailed(Exception):
    """The video that was waited for has ended without content; code says why."""

    def __init__(self, job_id: str, code: str, message: str) -> None:
        super().__init__(job_id, code, message)
        self.job_id, self.code, self.message = job_id, code, message

    def __str__(self) -> str:
        return f"{self.job_id}: {self.message}"


@dataclass(frozen=True, slots=True)
class Answer:
    """How an exception looks from outside."""

    status: int
    type: str
    code: str


INTERNAL = Answer(500, "server_error", "internal")
STAGE_FAILED = Answer(500, "server_error", "stage_failed")
OUT_OF_MEMORY = Answer(500, "server_error", "out_of_memory")

ANSWERS: dict[type[Exception], Answer] = {
    InvalidRequest: Answer(400, "invalid_request_error", "invalid_request"),
    NotSupported: Answer(400, "invalid_request_error", "not_supported"),
    VideoUnreadable: Answer(400, "invalid_request_error", "invalid_request"),
    UrlRefused: Answer(400, "invalid_request_error", "invalid_request"),
    Unauthenticated: Answer(401, "authentication_error", "unauthenticated"),
    InsufficientCredits: Answer(402, "billing_error", "insufficient_credits"),
    AccountDisabled: Answer(403, "permission_error", "account_disabled"),
    PlanForbids: Answer(403, "permission_error", "plan_forbids"),
    ModelNotFound: Answer(404, "invalid_request_error", "model_not_found"),
    AccountNotFound: Answer(404, "invalid_request_error", "not_found"),
    KeyNotFound: Answer(404, "invalid_request_error", "not_found"),
    EndpointNotFound: Answer(404, "invalid_request_error", "not_found"),
    DeliveryNotFound: Answer(404, "invalid_request_error", "not_found"),
    JobNotFound: Answer(404, "invalid_request_error", "not_found"),
    ObjectNotFound: Answer(404, "invalid_request_error", "not_found"),
    IdempotencyConflict: Answer(409, "invalid_request_error", "idempotency_conflict"),
    VideoNotReady: Answer(409, "invalid_request_error", "not_ready"),
    InputTooLarge: Answer(413, "invalid_request_error", "too_large"),
    RateLimited: Answer(429, "rate_limit_error", "rate_limited"),
    TooManyJobs: Answer(429, "rate_limit_error", "too_many_jobs"),
    DataError: Answer(400, "invalid_request_error", "invalid_request"),
    StorageFull: Answer(507, "billing_error", "storage_full"),
    AlreadySettled: INTERNAL,
    LeaseLost: INTERNAL,
    ForeignPackage: INTERNAL,
    CheckpointUnusable: INTERNAL,
    CheckpointUnreadable: INTERNAL,
    GroupBroken: INTERNAL,
    HandedOver: INTERNAL,
    SeatsUneven: INTERNAL,
    ModelTooLarge: INTERNAL,
    OutOfMemory: OUT_OF_MEMORY,
    RequestQuarantined: STAGE_FAILED,
    VideoFailed: STAGE_FAILED,
    MediaEncodingFailed: STAGE_FAILED,
    ComputeUnavailable: STAGE_FAILED,
    FirstBlockOnly: INTERNAL,
    StepAbandoned: INTERNAL,
    LicenceForbids: STAGE_FAILED,
    ControlDoesNotFit: STAGE_FAILED,
    LoraDoesNotFit: STAGE_FAILED,
    NotRecognised: STAGE_FAILED,
    SourceUnavailable: STAGE_FAILED,
    WeightsDamaged: STAGE_FAILED,
    WeightsMissing: STAGE_FAILED,
}


def answer_for(error: BaseException) -> Answer:
    """The table's entry for the nearest class in the exception's MRO.

    Exceptions that crossed a Ray actor carry their own class among their bases.
    """
    for ancestor in type(error).__mro__:
        if ancestor in ANSWERS:
            return ANSWERS[ancestor]
    return INTERNAL


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception with the OpenAI error envelope."""
    for error in ANSWERS:
        app.add_exception_handler(error, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer)


async def _answer(_request: Request, error: Exception) -> JSONResponse:
    answer = answer_for(error)
    details: dict[str, Any] = {}
    headers: dict[str, str] = {}
    match error:
        case InsufficientCredits():
            details = {"needed": error.needed, "available": error.available}
        case TooManyJobs():
            # A client that sent the same again by itself would be answered with an older job.
            headers |= {"Retry-After": "5", "x-should-retry": "false"}
        case RateLimited():
            headers["Retry-After"] = str(math.ceil(error.retry_after_s))
            headers["retry-after-ms"] = str(math.ceil(1000 * error.retry_after_s))
        case VideoFailed():
            details = {"code": error.code}
            headers["x-should-retry"] = "false"
        case StorageFull() | VideoNotReady() | IdempotencyConflict():
            headers["x-should-retry"] = "false"
    param = getattr(error, "param", "model" if isinstance(error, ModelNotFound) else None)
    message = str(error) if answer is not INTERNAL else "An internal error occurred."
    if isinstance(error, DataError):  # PostgreSQL's: NUL in a text, say; it shows our SQL
        message = "a value in the request cannot be stored"
    return JSONResponse(envelope(answer, message, param, **details), answer.status, headers)


async def _answer_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = Answer(error.status_code, "invalid_request_error", "http_error")
    return JSONResponse(envelope(answer, str(error.detail), None), error.status_code, error.headers)


def envelope(answer: Answer, message: str, param: str | None, **details: Any) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, with what else the error tells."""
    error = {"message": message, "type": answer.type, "param": param, "code": answer.code}
    return {"error": {**error, **details}}
