"""What a model can't make of a request that is well formed: InvalidRequest, naming the field."""

from typing import TYPE_CHECKING

from models.families import LCM_STEPS, SCHEDULERS
from models.request import (
    ControlKind,
    InvalidRequest,
    ModelFamily,
    NotSupported,
    Scheduler,
    VideoRequest,
)

if TYPE_CHECKING:
    from models.catalog import Model

# Of a text's tokens; with fewer, nothing is said.
LEAST_TEXT_TOKENS = 32


def check_request(model: "Model", request: VideoRequest) -> None:
    """InvalidRequest at the first fault."""
    _check_bounds(model, request)
    _check_loras(model, request)
    _check_control(model, request)
    _check_regions(model, request)
    _check_steps(request)


def _check_bounds(model: "Model", request: VideoRequest) -> None:
    manifest, spec = model.manifest, model.spec
    if not spec.guidance and request.guidance_scale != manifest.defaults.guidance_scale:
        message = f"{model.id} takes no guidance_scale; true_cfg_scale guides it"
        raise NotSupported("guidance_scale", message)
    if not manifest.min_frames <= request.num_frames <= model.max_frames:
        raise InvalidRequest(
            "num_frames",
            f"num_frames must be {manifest.min_frames} to {model.max_frames} "
            f"for {model.id}, not {request.num_frames}",
        )
    if request.f_patch_size not in spec.f_patch_sizes:
        sizes = ", ".join(map(str, spec.f_patch_sizes))
        raise InvalidRequest("f_patch_size", f"f_patch_size must be one of {sizes}")
    for param, side in (("width", request.width), ("height", request.height)):
        if side % 2:
            raise InvalidRequest("size", f"{param} must be even, not {side}")
        if not spec.size_multiple <= side <= manifest.max_side:
            raise InvalidRequest(
                "size",
                f"{param} must be {spec.size_multiple} to {manifest.max_side}, not {side}",
            )
    known = SCHEDULERS.get(manifest.family, ())
    if request.scheduler is not None and request.scheduler not in known:
        message = f"scheduler must be one of {', '.join(known)} for {model.id}"
        raise InvalidRequest("scheduler", message)
    by_lcm = (request.scheduler or spec.scheduler) is Scheduler.LCM
    is_distilled = manifest.family is ModelFamily.ANIMATEDIFF
    if by_lcm and is_distilled and request.num_steps > LCM_STEPS:
        raise InvalidRequest("num_steps", f"num_steps must be at most {LCM_STEPS} with lcm")
    if request.width * request.height > manifest.max_area:
        raise InvalidRequest("size", f"width x height must be at most {manifest.max_area}")


def _check_loras(model: "Model", request: VideoRequest) -> None:
    known = {lora.id for lora in model.loras}
    names = [use.name for use in request.loras]
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise InvalidRequest("loras", f"{model.id} has no LoRA {name!r}; it has {there}")
    if len(set(names)) < len(names):
        raise InvalidRequest("loras", "loras: one is named twice")


def _check_control(model: "Model", request: VideoRequest) -> None:
    control = request.control
    if control is None:
        return
    net = model.control_net(control.type)
    if control.start >= control.end:
        raise InvalidRequest("control", "control: start must be less than end")
    if control.preprocess and control.type is not ControlKind.CANNY:
        message = f"control: only canny is made here; give {control.type} as pictures"
        raise NotSupported("control", message)
    if net.f_patch_sizes is not None and request.f_patch_size not in net.f_patch_sizes:
        sizes = ", ".join(map(str, net.f_patch_sizes))
        message = f"f_patch_size must be one of {sizes} with this control"
        raise InvalidRequest("f_patch_size", message)
    if control.frames is None:
        return
    if not net.is_sparse:
        raise NotSupported("control", f"control: {control.type} leads every frame")
    in_order = sorted(set(control.frames))
    if list(control.frames) != in_order or in_order[-1] >= request.num_frames:
        message = f"control: frames must be in order, and of 0 to {request.num_frames - 1}"
        raise InvalidRequest("control", message)


def _check_regions(model: "Model", request: VideoRequest) -> None:
    param = "regions" if request.regions else "seed_variance"
    variance = request.seed_variance
    if request.regions and variance is not None and variance.per_frame:
        raise InvalidRequest("seed_variance", "seed_variance: per_frame goes with no regions")
    if model.max_text_tokens(request) < LEAST_TEXT_TOKENS:
        message = f"{param}: {model.id} has no room for so many texts in so many frames"
        raise InvalidRequest(param, message)
    last_frame = request.num_frames - 1
    for region in request.regions:
        if region.box is None and region.frames is None and not region.has_mask:
            raise InvalidRequest("regions", "regions: each needs a mask, a box or frames")
        if region.box is not None:
            x, y, width, height = region.box
            if not (0 < width <= request.width - x and 0 < height <= request.height - y):
                message = f"regions: a box must lie within {request.width}x{request.height}"
                raise InvalidRequest("regions", message)
        if region.frames is not None:
            first, last = region.frames
            if not first <= last <= last_frame:
                message = f"regions: frames must be a first and a last one of 0 to {last_frame}"
                raise InvalidRequest("regions", message)


def _check_steps(request: VideoRequest) -> None:
    if request.strength is not None and request.denoising_start is not None:
        message = "denoising_start and strength say the same: give one"
        raise InvalidRequest("denoising_start", message)
    if request.first_step >= request.last_step:
        message = f"no step of {request.num_steps} is between denoising_start and denoising_end"
        raise InvalidRequest("denoising_end", message)
