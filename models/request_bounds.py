"""What a model can't make of a request that is well formed: InvalidRequest, naming the field."""

from typing import TYPE_CHECKING

from models.families import LCM_STEPS, SCHEDULERS, TRANSFORMERS
from models.request import (
    CacheBy,
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
    _check_skipping(model, request)
    _check_free_noise(model, request)


def _check_bounds(model: "Model", request: VideoRequest) -> None:
    manifest, spec = model.manifest, model.spec
    if not spec.guidance and request.guidance_scale != manifest.defaults.guidance_scale:
        message = f"{model.id} takes no guidance_scale; true_cfg_scale guides it"
        raise NotSupported("guidance_scale", message)
    _check_frames(model, request)
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


def _check_frames(model: "Model", request: VideoRequest) -> None:
    least, most = model.min_frames(request), model.max_frames
    with_it = ""
    if request.free_noise is not None:
        most = model.manifest.max_free_noise_frames
        with_it = " with this free_noise"
    if not least <= request.num_frames <= most:
        raise InvalidRequest(
            "num_frames",
            f"num_frames must be {least} to {most} for {model.id}{with_it}, "
            f"not {request.num_frames}",
        )


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


def _check_skipping(model: "Model", request: VideoRequest) -> None:
    by_heun = request.scheduler is Scheduler.HEUN
    for name in ("step_cache", "cfg_skip_ratio"):
        if by_heun and getattr(request, name):
            message = f"{name}: a step by heun predicts twice, and skips nothing"
            raise NotSupported(name, message)
    if request.cfg_skip_ratio and not request.guided:
        message = "cfg_skip_ratio: this request is made without classifier-free guidance"
        raise NotSupported("cfg_skip_ratio", message)
    cache = request.step_cache
    if (
        cache is not None
        and cache.by is CacheBy.FIRST_BLOCK
        and model.manifest.family not in TRANSFORMERS
    ):
        message = f"step_cache: {model.id} is no transformer: by must be {CacheBy.PREDICTION}"
        raise NotSupported("step_cache", message)


def _check_free_noise(model: "Model", request: VideoRequest) -> None:
    windows = request.free_noise
    if windows is None:
        return
    positions = model.spec.max_positions
    if positions is not None and windows.context_length > positions:
        message = f"free_noise: context_length must be at most {positions} for {model.id}"
        raise InvalidRequest("free_noise", message)
    if windows.context_stride > windows.context_length:
        message = "free_noise: context_stride must be at most context_length"
        raise InvalidRequest("free_noise", message)
    control = request.control
    is_sparse = control is not None and model.control_net(control.type).is_sparse
    if request.start_image is not None or is_sparse:
        message = "free_noise: SparseCtrl and start images lead no more frames than fit at once"
        raise NotSupported("free_noise", message)


def _check_steps(request: VideoRequest) -> None:
    if request.strength is not None and request.denoising_start is not None:
        message = "denoising_start and strength say the same: give one"
        raise InvalidRequest("denoising_start", message)
    if request.first_step >= request.last_step:
        message = f"no step of {request.num_steps} is between denoising_start and denoising_end"
        raise InvalidRequest("denoising_end", message)
