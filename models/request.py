"""What a model is asked: one frozen request, complete enough to make the same video again."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, Field

STORED_INPUTS = (
    "start_image",
    "source_video",
    "mask",
    "continues",
    "control_reference",
    "region_masks",
)


class ModelFamily(StrEnum):
    """The kinds of model that have a price and a file of their own."""

    Z_IMAGE_VIDEO = "z-image-video"
    ANIMATEDIFF = "animatediff"
    SVD = "svd"
    SVD_XT = "svd-xt"
    HUNYUAN_VIDEO = "hunyuan-video"


class Scheduler(StrEnum):
    """How noise is taken away; what a checkpoint says otherwise stays."""

    DDIM = "ddim"
    EULER = "euler"
    HEUN = "heun"
    LCM = "lcm"


class LoraUse(BaseModel, frozen=True, extra="forbid"):
    """A LoRA that the operator has put beside the model, and how much of it."""

    name: str = Field(min_length=1, max_length=128)
    weight: float = Field(1.0, ge=-4, le=4)


Pixel = Annotated[int, Field(ge=0, le=100_000)]


class ControlKind(StrEnum):
    """What a picture that leads a video shows: the usual ones of ControlNets, and frames as they
    are to be (SparseCtrl's RGB).
    """

    CANNY = "canny"
    DEPTH = "depth"
    POSE = "pose"
    HED = "hed"
    MLSD = "mlsd"
    SCRIBBLE = "scribble"
    RGB = "rgb"


class Control(BaseModel, frozen=True, extra="forbid"):
    """How a reference leads the video.

    frames: which frames it has pictures of, None: all. scale: times what the control network says;
    start, end: the share of the steps in which it does. preprocess: whether the pictures of that
    type are made of the reference here.
    """

    type: ControlKind
    scale: float = Field(1.0, ge=0, le=2)
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)
    preprocess: bool = False
    frames: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)

    def acts_in(self, step: int, num_steps: int) -> bool:
        """Whether it has a say in a step, counted from 0, as in diffusers' pipelines."""
        within = step / num_steps >= self.start and (step + 1) / num_steps <= self.end
        return within and self.scale > 0


class Region(BaseModel, frozen=True, extra="forbid"):
    """Words for a part of the video: in a box of pixels (x, y, width, height), in what a mask
    leaves white, in frames first..last; what is not given is no limit.
    """

    prompt: str = Field(min_length=1)
    box: tuple[Pixel, Pixel, Pixel, Pixel] | None = None
    frames: tuple[Pixel, Pixel] | None = None
    has_mask: bool = False


class SeedVariance(BaseModel, frozen=True, extra="forbid"):
    """How far the words' states are changed from one seed to the next.

    strength: in their deviations; percent of them are changed. per_frame: each token's frames by
    a seed of their own.
    """

    strength: float = Field(0.1, ge=0, le=2)
    percent: float = Field(50.0, ge=1, le=100)
    per_frame: bool = False


class CacheBy(StrEnum):
    """What tells whether a prediction may be made use of again: the change of what the first block
    of a transformer adds (as ParaAttention's first-block cache), or that of the latents, times what
    the prediction has changed for one before (as EasyCache, arXiv:2507.02860).
    """

    FIRST_BLOCK = "first_block"
    PREDICTION = "prediction"


class StepCache(BaseModel, frozen=True, extra="forbid"):
    """Steps whose prediction would change by less than threshold make do with the one before.

    The first warm_up steps and the last one are always made: what a video shows is decided early,
    and a small difference may decide it otherwise.
    """

    by: CacheBy = CacheBy.PREDICTION
    threshold: float = Field(gt=0, le=1)
    warm_up: int = Field(4, ge=1, le=200)


class FreeNoise(BaseModel, frozen=True, extra="forbid"):
    """More frames than a motion module tells apart: it sees context_length of them at a time, each
    time context_stride further on.
    """

    context_length: int = Field(16, ge=2, le=128)
    context_stride: int = Field(4, ge=1, le=128)


class InvalidRequest(Exception):
    """A field of a request is missing, malformed or out of range; param names it."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(param, message)
        self.param, self.message = param, message

    def __str__(self) -> str:
        return self.message


class NotSupported(InvalidRequest):
    """A field or a route that the API knows and that nothing here does."""


class VideoRequest(BaseModel, frozen=True, extra="forbid"):
    """One video to make; every default is filled in, the seed too.

    num_frames, width and height are what was asked and is billed; the model may generate the next
    size that it can and the result is trimmed. STORED_INPUTS are keys of the object store.
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
    # How far the noise levels lean to the noisy end; None: as the checkpoint says.
    flow_shift: float | None = Field(None, gt=0, le=100)
    motion_strength: float | None = Field(None, ge=0, le=1)
    # SVD: guidance goes from the first frame's to the last one's, guidance_scale.
    min_guidance_scale: float | None = Field(None, ge=0, le=20)
    motion_bucket_id: int | None = Field(None, ge=0, le=255)
    noise_aug_strength: float | None = Field(None, ge=0, le=1)
    # HunyuanVideo: its guidance_scale is an input; this is guidance by a negative prompt.
    true_cfg_scale: float | None = Field(None, ge=1, le=20)
    # None: the checkpoint's own.
    scheduler: Scheduler | None = None
    loras: tuple[LoraUse, ...] = Field((), max_length=8)
    start_image: str | None = None
    # Width over height of what the start image was fitted from.
    start_image_aspect: float | None = None
    # A video to change, and how much of it: the share of the denoising that is done anew.
    source_video: str | None = None
    strength: float | None = Field(None, gt=0, le=1)
    # The same as shares of the steps: those before the start and from the end on are not made.
    denoising_start: float | None = Field(None, ge=0, lt=1)
    denoising_end: float | None = Field(None, gt=0, le=1)
    # Of the video to change, what is to be: an image or a video, white where all is made anew.
    mask: str | None = None
    # An image or a video, and how it leads this one.
    control_reference: str | None = None
    control: Control | None = None
    # What is said of parts of the video only, and where, of those that have a mask: a file of
    # bool [M, F or 1, H, W].
    regions: tuple[Region, ...] = Field((), max_length=16)
    region_masks: str | None = None
    seed_variance: SeedVariance | None = None
    # Fewer passes of the model: earlier predictions again, and no negative text in that share of
    # the steps, the last ones.
    step_cache: StepCache | None = None
    cfg_skip_ratio: float | None = Field(None, ge=0, le=1)
    # AnimateDiff: windows of frames, for videos of more than fit into one.
    free_noise: FreeNoise | None = None
    # A video to go on from, and its frames; the start image is its last one.
    continues: str | None = None
    continued_frames: int = Field(0, ge=0)
    remixed_from: str | None = None
    tags: tuple[Annotated[str, Field(max_length=64)], ...] = Field((), max_length=16)
    user: str | None = Field(None, max_length=256)

    @property
    def guided(self) -> bool:
        """Whether a step predicts twice, for classifier-free guidance."""
        match self.family:
            case ModelFamily.HUNYUAN_VIDEO:
                return (self.true_cfg_scale or 1.0) > 1.0
            case ModelFamily.Z_IMAGE_VIDEO:
                return self.guidance_scale != 1.0
            case _:
                return self.guidance_scale > 1.0

    @property
    def first_step(self) -> int:
        """Where the last `strength` of the steps begins, of which at least one is made, or the
        share before `denoising_start` ends; 0 without (SDEdit, arXiv:2108.01073).
        """
        if self.denoising_start is not None:
            return int(self.num_steps * self.denoising_start)
        if self.strength is None:
            return 0
        return self.num_steps - max(1, round(self.num_steps * self.strength))

    @property
    def last_step(self) -> int:
        """How many steps are made, those before the first among them."""
        if self.denoising_end is None:
            return self.num_steps
        return int(self.num_steps * self.denoising_end)

    @property
    def passes_per_step(self) -> int:
        """Of the model, if nothing is skipped: one for each text."""
        return 2 if self.guided else 1

    @property
    def planned_passes(self) -> int:
        """Of the model in all steps, if nothing is skipped; a step by heun looks twice, but not
        the one that ends without noise.
        """
        made = self.last_step - self.first_step
        twice = min(self.last_step, self.num_steps - 1) - self.first_step
        more = max(0, twice) if self.scheduler is Scheduler.HEUN else 0
        return (made + more) * self.passes_per_step

    def skips_guidance(self, step: int) -> bool:
        """Whether a step, counted from 0, goes without the negative text."""
        if not self.guided or not self.cfg_skip_ratio:
            return False
        made = self.last_step - self.first_step
        return step >= self.last_step - int(made * self.cfg_skip_ratio)

    @property
    def new_frames(self) -> int:
        """The frames that are billed: not the one that a continuation begins from."""
        return self.num_frames - (self.continues is not None)

    @property
    def total_frames(self) -> int:
        """The frames of the finished video."""
        return self.continued_frames + self.new_frames


def read_stored(fields: Mapping[str, Any]) -> VideoRequest:
    """A request for showing and settling only, as it was written and unchecked.

    It may be a newer version's, of fields and values that are unknown here. What is run must be a
    VideoRequest that this version has checked.
    """
    return VideoRequest.model_construct(**fields)


def stored_inputs(fields: Mapping[str, Any]) -> list[str]:
    """The keys of what a request needs from the object store, of any version's fields."""
    return [fields[name] for name in STORED_INPUTS if fields.get(name) is not None]
