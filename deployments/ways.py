"""How the ranks of a group may share a request's steps."""

import logging
from collections.abc import Collection
from dataclasses import dataclass

from deployments.rank_group import Begun
from models.request import VideoRequest
from parallel.plan import ParallelPlan, StepShape, Topology, quickest_plans

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Way:
    """What a step costs, and how each number of ranks shares it best."""

    shape: StepShape
    plans: dict[int, ParallelPlan]


def ways_of(
    request: VideoRequest,
    begun: Begun,
    size: int,
    topology: Topology,
    degrees: Collection[int] | None,
    fitting: Collection[int] | None,
) -> tuple[Way, Way]:
    """Of steps with all texts, and of those with the positive alone, if there will be any.

    size: of the group; fitting: the degrees at which the request fits into memory, None: all.
    """
    plans = quickest_plans(begun.shape, size, topology, degrees)
    if fitting is not None:
        within = {degree: plans[degree] for degree in plans if degree in fitting}
        if not within:  # admitted by another configuration; OutOfMemory tells if it is too much
            logger.warning("%s: a request is tried that fits at none of %s", request.model, plans)
        plans = within or plans
    way = Way(begun.shape, plans)
    if not request.cfg_skip_ratio:
        return way, way
    of_one = quickest_plans(begun.of_one_text, size, topology)
    # where none has the degree, all branches make the one text
    return way, Way(begun.of_one_text, {d: of_one.get(d, plans[d]) for d in plans})
