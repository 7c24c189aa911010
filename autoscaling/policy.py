"""Ray Serve's application-level policy, which serve_config.yaml names (`autoscaling_policy`)."""

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

WANTED = "wanted/"
"""What begins the name of a figure that says how many replicas a deployment is to have."""
POOLS = ("Denoiser-", "VaeDecoder-")
"""The deployments that are scaled by those figures alone, however many requests wait for them."""


class ByDemand:
    """A pool gets what the pipeline says that it wants, which all of its replicas say alike; a
    deployment of another kind gets what Serve's own policy says. Where no pipeline has told of a
    pool lately, it stays as it is.
    """

    def __call__(
        self, contexts: Mapping[Any, AutoscalingContext]
    ) -> tuple[dict[Any, int | float], dict[Any, dict[str, Any]]]:
        """Replicas by deployment; nothing is awaited or read here."""
        wanted: dict[str, float] = {}
        for context in contexts.values():
            for name, by_replica in (context.aggregated_metrics or {}).items():
                if name.startswith(WANTED) and by_replica:
                    wanted[name.removeprefix(WANTED)] = max(by_replica.values())
        replicas: dict[Any, int | float] = {}
        states: dict[Any, dict[str, Any]] = {}
        for deployment, context in contexts.items():
            name = context.deployment_name
            if name in wanted:
                count = replicas[deployment] = math.floor(wanted[name] + 0.5)
                if context.current_num_replicas == 0:
                    # Serve gives whoever waits for an empty pool this many, and does not ask here
                    # until one of them works.
                    context.target_num_replicas = max(context.target_num_replicas, count)
            elif not name.startswith(POOLS):
                replicas[deployment], states[deployment] = replica_queue_length_autoscaling_policy(
                    context
                )
        return replicas, states
