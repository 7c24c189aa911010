"""The price of a video that is not made, of any family in the price table."""

from dataclasses import dataclass

from pydantic import BaseModel, Field, ValidationError

from credits.pricing import Quote, quote
from deployments.admission import Admission
from deployments.config import LimitsConfig
from deployments.request_body import CreateBody
from models.families import FIELDS_OF_FAMILIES, MAX_FREE_NOISE_FRAMES, PUBLISHED
from models.request import InvalidRequest, ModelFamily


@dataclass(frozen=True, slots=True)
class Estimate:
    """A price, what it is for, and what would be generated and then cut to that."""

    quote: Quote
    model: str
    family: ModelFamily
    deployed: bool
    width: int
    height: int
    generated_frames: int
    generated_width: int
    generated_height: int


class _Dimensions(BaseModel, extra="ignore"):
    num_frames: int = Field(ge=1)
    width: int = Field(ge=16, multiple_of=2)
    height: int = Field(ge=16, multiple_of=2)


def make_estimate(admission: Admission, body: CreateBody, limits: LimitsConfig) -> Estimate:
    """Price what is deployed as it would be made, and the rest of each family as it is published.

    ModelNotFound for a name that is neither; InvalidRequest naming the faulty field.
    """
    if body.model not in set(ModelFamily):
        return _of_deployed(admission, body, limits)
    family = ModelFamily(body.model)
    if body.model not in admission.offers:
        return _of_published(admission, body, family)
    try:
        return _of_deployed(admission, body, limits)
    except InvalidRequest as refused:
        if refused.param not in ("num_frames", "size"):
            raise
        try:  # the deployed model may be a smaller one of the family
            return _of_published(admission, body, family)
        except InvalidRequest:
            raise refused from None


def _of_deployed(admission: Admission, body: CreateBody, limits: LimitsConfig) -> Estimate:
    model = admission.offer(body.model).model
    body = CreateBody(body.model, {"prompt": "-", **body.fields})
    request = body.resolve(model, limits)
    width, height = model.spec.generated_size(request.width, request.height)
    return Estimate(
        admission.quote(request),
        model.id,
        request.family,
        True,
        request.width,
        request.height,
        model.spec.generated_frames(request.num_frames, request.f_patch_size),
        width,
        height,
    )


def _of_published(admission: Admission, body: CreateBody, family: ModelFamily) -> Estimate:
    published = PUBLISHED[family]
    defaults = {
        "num_frames": published.num_frames,
        "width": published.width,
        "height": published.height,
    }
    try:
        asked = _Dimensions.model_validate({**defaults, **body.with_size_and_frames(published.fps)})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(str(first["loc"][0]), f"{first['loc'][0]}: {first['msg']}") from None
    in_windows = "free_noise" in body.fields and family in FIELDS_OF_FAMILIES["free_noise"]
    most = MAX_FREE_NOISE_FRAMES if in_windows else published.max_frames
    if asked.num_frames > most:
        message = f"{family} makes at most {most} frames"
        raise InvalidRequest("num_frames", message)
    stride, multiple = published.frame_stride, published.size_multiple
    price = quote(
        admission.prices,
        family,
        num_frames=asked.num_frames,
        width=asked.width,
        height=asked.height,
    )
    return Estimate(
        price,
        family,
        family,
        False,
        asked.width,
        asked.height,
        -(-(asked.num_frames - 1) // stride) * stride + 1,
        -(-asked.width // multiple) * multiple,
        -(-asked.height // multiple) * multiple,
    )
