"""What a model is asked: one frozen request, complete enough to make the same video again."""

from enum import StrEnum

from pydantic import BaseModel, Field


class ModelFamily(StrEnum):
    """The kinds of model that have a price and a file of their own."""

    Z_IMAGE_VIDEO = "z-image-video"
    ANIMATEDIFF = "animatediff"
    SVD = "svd"
    SVD_XT = "svd-xt"
    HUNYUAN_VIDEO = "hunyuan-video"


class InvalidRequest(Exception):
    """A field of a request is missing, malformed or out of range; param names it."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(param, message)
        self.param, self.message = param, message

    def __str__(self) -> str:
        return self.message


class VideoRequest(BaseModel, frozen=True, extra="forbid"):
    """One video to make; every default is filled in, the seed too.

    num_frames, width and height are what was asked and is billed; the model may generate the next
    size that it can and the result is trimmed. start_image is a key of the object store.
    """

    model: str
    family: ModelFamily
    prompt: str
    negative_prompt: str = ""
    num_frames: int = Field(ge=1)
    width: int = Field(ge=2)
    height: int = Field(ge=2)
    fps: int = Field(ge=1, le=60)
    f_patch_size: int = Field(ge=1)
    num_steps: int = Field(ge=1, le=200)
    guidance_scale: float = Field(ge=0, le=20)
    seed: int = Field(ge=0, lt=2**63)
    start_image: str | None = None
