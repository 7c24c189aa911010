"""What the attempts at a job leave for the next one, and for those who predict its like."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from sqlalchemy import Engine

from deployments.messages import Denoised
from jobs.job import Job, Phase
from jobs.stage_times import TimedStage, note_times
from models.cost import VideoShape
from models.request import VideoRequest


@dataclass(slots=True)
class Made:
    """What a job's earlier attempts have left: the latents, what they took, what to warn of.

    step_s: of its steps, by the number of ranks; decode_s: of its frames, once there are any.
    """

    denoised: Denoised | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    step_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode_s: float | None = None
    warnings: list[str] = field(default_factory=list)


def note_times_of(engine: Engine, job: Job, made: Made) -> None:
    """Keep what its steps and its decode took, if it came so far."""
    if made.decode_s is None:
        return
    request = VideoRequest.model_validate(job.request)
    like = (request.model, str(VideoShape.of(request)), job.tier)
    took_s = [
        (TimedStage(*like, Phase.DENOISE, degree), statistics.median(steps))
        for degree, steps in made.step_s.items()
    ]
    took_s.append((TimedStage(*like, Phase.DECODE), made.decode_s))
    with engine.begin() as connection:
        note_times(connection, took_s)
