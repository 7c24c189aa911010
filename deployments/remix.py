"""What a remix keeps of the request whose video it makes anew with other words."""

from typing import Any

from deployments.request_body import CreateBody
from models.families import WITHOUT_PROMPT
from models.request import InvalidRequest, NotSupported, VideoRequest

REMIXED = (
    "prompt", "negative_prompt", "num_frames", "width", "height", "fps", "f_patch_size",
    "num_steps", "guidance_scale", "flow_shift", "motion_strength", "seed", "min_guidance_scale",
    "motion_bucket_id", "noise_aug_strength", "true_cfg_scale", "scheduler",
    "loras", "regions", "seed_variance", "free_noise",
)  # fmt: skip
# Fields that say again, all or in part, what another one has said.
REPLACED = {
    "size": ("width", "height"),
    "seconds": ("num_frames",),
    "motion_strength": ("motion_bucket_id",),
    "motion_bucket_id": ("motion_strength",),
}


def kept_fields(former: VideoRequest, model: str, body: CreateBody) -> dict[str, Any]:
    """The former's settings that the body does not say anew; InvalidRequest, NotSupported.

    Of the files that it came with none is kept.
    """
    if former.source_video is not None or former.continues is not None:
        raise NotSupported("video_id", "edited and extended videos cannot be remixed")
    if body.model not in (None, model):
        raise InvalidRequest("model", f"a remix is made by the video's own model, {model}")
    if "prompt" not in body.fields and former.family not in WITHOUT_PROMPT:
        raise InvalidRequest("prompt", "prompt is required")
    if former.control is not None and body.control_reference is None:
        message = "control_reference is required: what led the video is not kept"
        raise InvalidRequest("control_reference", message)
    replaced = {name for field in body.fields for name in REPLACED.get(field, ())}
    if body.schedule:
        replaced.add("regions")
    if former.region_masks is not None and not {"regions"} & (replaced | body.fields.keys()):
        raise InvalidRequest("regions", "regions is required: their masks are not kept")
    return {name: getattr(former, name) for name in REMIXED if name not in replaced}
