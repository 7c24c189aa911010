"""What each plan allows: a table that is data and pure checks against it."""

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, Field, model_validator

from models.request import ModelFamily, VideoRequest


class Plan(StrEnum):
    """What an account pays for."""

    FREE = "free"
    BASIC = "basic"
    PRO = "pro"
    ENTERPRISE = "enterprise"


class PlanForbids(Exception):
    """The plan does not include this; param names the field that asks for it."""

    def __init__(self, plan: str, param: str, message: str) -> None:
        super().__init__(plan, param, message)
        self.plan, self.param, self.message = plan, param, message

    def __str__(self) -> str:
        return self.message


class StorageFull(Exception):
    """The account's videos take all the room of its plan."""

    def __init__(self, used_bytes: int, limit_bytes: int) -> None:
        super().__init__(used_bytes, limit_bytes)
        self.used_bytes, self.limit_bytes = used_bytes, limit_bytes

    def __str__(self) -> str:
        return (
            f"the plan's storage is full: {self.used_bytes} of {self.limit_bytes} bytes are used "
            "or promised to jobs; delete videos"
        )


class TooManyJobs(Exception):
    """The account has as many jobs queued or running as its plan allows."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"at most {self.limit} jobs may be queued or running at once on this plan"


class PlanLimits(BaseModel, frozen=True, extra="forbid"):
    """max_frames counts frames after the first for 4k+1 models; sizes hold in either orientation.

    priority: higher is leased first. image_to_video: whether a start image, LoRAs, or
    a video to change or to go on from, may be given.
    max_stored_bytes: of the account's MP4s. kept_days: how long a video is kept; None: until it is
    deleted.
    """

    max_frames: int
    max_long_side: int
    max_area: int
    families: frozenset[ModelFamily]
    max_jobs: int
    image_to_video: bool
    priority: int
    max_stored_bytes: int
    kept_days: int | None = Field(None, ge=1)

    @property
    def kept_ms(self) -> int | None:
        """kept_days in milliseconds."""
        return None if self.kept_days is None else self.kept_days * 86_400_000


SVD_FAMILIES = frozenset({ModelFamily.SVD, ModelFamily.SVD_XT})
BASIC_FAMILIES = frozenset({ModelFamily.ANIMATEDIFF})
PRO_FAMILIES = BASIC_FAMILIES | SVD_FAMILIES | {ModelFamily.Z_IMAGE_VIDEO}


class PlanTable(BaseModel, frozen=True, extra="forbid"):
    """The limits of each plan."""

    limits: dict[Plan, PlanLimits] = {
        Plan.FREE: PlanLimits(
            max_frames=0, max_long_side=0, max_area=0, families=frozenset(),
            max_jobs=0, image_to_video=False, priority=0, max_stored_bytes=0,
            kept_days=7,
        ),
        Plan.BASIC: PlanLimits(
            max_frames=16, max_long_side=512, max_area=512 * 512, families=BASIC_FAMILIES,
            max_jobs=1, image_to_video=False, priority=1, max_stored_bytes=2 * 10**9,
            kept_days=7,
        ),
        Plan.PRO: PlanLimits(
            max_frames=48, max_long_side=1280, max_area=1280 * 720, families=PRO_FAMILIES,
            max_jobs=2, image_to_video=True, priority=2, max_stored_bytes=10 * 10**9,
            kept_days=30,
        ),
        Plan.ENTERPRISE: PlanLimits(
            max_frames=128, max_long_side=1920, max_area=1920 * 1080,
            families=frozenset(ModelFamily), max_jobs=4, image_to_video=True, priority=3,
            max_stored_bytes=50 * 10**9,
        ),
    }  # fmt: skip

    @model_validator(mode="after")
    def _every_plan_has_limits(self) -> Self:
        missing = sorted(set(Plan) - set(self.limits))
        if missing:
            raise ValueError(f"no limits for the plan {missing[0]!r}")
        return self


def check_plan(plan: Plan, limits: PlanLimits, request: VideoRequest, frame_stride: int) -> None:
    """Raise PlanForbids at the first limit that the request exceeds."""
    if not limits.families:
        raise PlanForbids(plan, "model", f"the {plan} plan does not include video")
    if request.family not in limits.families:
        raise PlanForbids(plan, "model", f"the {plan} plan does not include {request.family}")
    is_free = frame_stride > 1 or request.continues is not None  # the first frame, in both cases
    counted = request.num_frames - is_free
    if counted > limits.max_frames:
        raise PlanForbids(plan, "num_frames", f"the {plan} plan allows {limits.max_frames} frames")
    long_side, area = max(request.width, request.height), request.width * request.height
    if long_side > limits.max_long_side or area > limits.max_area:
        raise PlanForbids(
            plan,
            "size",
            f"the {plan} plan allows {limits.max_area} pixels "
            f"and {limits.max_long_side} on the long side",
        )
    if request.start_image is not None and not limits.image_to_video:
        raise PlanForbids(
            plan, "input_reference", f"the {plan} plan does not include image-to-video"
        )
    if request.control is not None and not limits.image_to_video:
        raise PlanForbids(plan, "control", f"the {plan} plan does not include control")
    if request.loras and not limits.image_to_video:
        raise PlanForbids(plan, "loras", f"the {plan} plan does not include LoRAs")
    if request.source_video is not None or request.continues is not None:
        check_may_derive(plan, limits)


def check_may_derive(plan: Plan, limits: PlanLimits) -> None:
    """Raise PlanForbids unless the plan includes making videos from videos."""
    if not limits.image_to_video:
        message = f"the {plan} plan does not include changing and extending videos"
        raise PlanForbids(plan, "video", message)
