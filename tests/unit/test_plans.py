"""Plans refuse what they don't include, naming the field."""

from collections.abc import Callable

import pytest

from autoscaling.tiers import GpuTier, ServedOn, choose_tier
from credits.plans import Plan, PlanForbids, PlanTable, check_plan
from models.request import InvalidRequest, ModelFamily, VideoRequest

LIMITS = PlanTable().limits
ARequest = Callable[..., VideoRequest]


def check(plan: Plan, request: VideoRequest) -> None:
    check_plan(plan, LIMITS[plan], request, frame_stride=4)


def of_family(request: VideoRequest, family: ModelFamily) -> VideoRequest:
    return request.model_copy(update={"family": family})


@pytest.mark.parametrize(
    ("plan", "changes", "param"),
    [
        (Plan.FREE, {}, "model"),
        (Plan.BASIC, {}, "model"),
        (Plan.BASIC, {"family": ModelFamily.ANIMATEDIFF, "num_frames": 18}, "num_frames"),
        (Plan.BASIC, {"family": ModelFamily.ANIMATEDIFF, "start_image": "k"}, "input_reference"),
        (Plan.BASIC, {"family": ModelFamily.ANIMATEDIFF, "width": 514}, "size"),
        (Plan.PRO, {"family": ModelFamily.HUNYUAN_VIDEO}, "model"),
        (Plan.PRO, {"num_frames": 50}, "num_frames"),
        (Plan.PRO, {"width": 1282, "height": 64}, "size"),
        (Plan.ENTERPRISE, {"num_frames": 130}, "num_frames"),
        (Plan.ENTERPRISE, {"width": 1920, "height": 1082}, "size"),
    ],
)
def test_beyond_the_plan_is_refused(
    a_request: ARequest, plan: Plan, changes: dict[str, object], param: str
) -> None:
    with pytest.raises(PlanForbids) as refused:
        check(plan, a_request().model_copy(update=changes))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (Plan.BASIC, {"family": ModelFamily.ANIMATEDIFF, "num_frames": 17}),
        (Plan.PRO, {"num_frames": 49, "width": 720, "height": 1280}),
        (Plan.PRO, {"start_image": "k"}),
        (Plan.ENTERPRISE, {"num_frames": 129, "width": 1920, "height": 1080}),
    ],
)
def test_up_to_the_limit_is_allowed(
    a_request: ARequest, plan: Plan, changes: dict[str, object]
) -> None:
    check(plan, a_request().model_copy(update=changes))


def test_the_first_frame_is_free_only_for_causal_models(a_request: ARequest) -> None:
    request = of_family(a_request(num_frames=17), ModelFamily.ANIMATEDIFF)
    with pytest.raises(PlanForbids):
        check_plan(Plan.BASIC, LIMITS[Plan.BASIC], request, frame_stride=1)


def test_the_tier_is_the_first_that_takes_the_size(a_request: ARequest) -> None:
    served_on = (ServedOn(tier=GpuTier.T4, max_area=64 * 64), ServedOn(tier=GpuTier.A100))
    assert choose_tier(served_on, Plan.ENTERPRISE, a_request()) is GpuTier.T4
    assert choose_tier(served_on, Plan.ENTERPRISE, a_request(width=80)) is GpuTier.A100
    with pytest.raises(PlanForbids, match="a100"):
        choose_tier(served_on, Plan.PRO, a_request(width=80))
    with pytest.raises(InvalidRequest):
        choose_tier(served_on[:1], Plan.PRO, a_request(width=80))


def test_no_plan_limits_this_machine(a_request: ARequest) -> None:
    served_on = (ServedOn(tier=GpuTier.LOCAL),)
    assert choose_tier(served_on, Plan.BASIC, a_request()) is GpuTier.LOCAL


def test_a_table_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="enterprise"):
        PlanTable(limits={plan: LIMITS[plan] for plan in Plan if plan != Plan.ENTERPRISE})
