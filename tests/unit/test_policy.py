"""What Ray Serve does with what the pipeline wants, by Serve's own delays and bounds."""

import time
from typing import Any

import pytest
import ray.serve.autoscaling_policy as serve_policy
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from autoscaling.policy import WANTED, ByDemand

DENOISER, DECODER = "Denoiser-a100", "VaeDecoder-a100"


def context(name: str, current: int, **changes: Any) -> AutoscalingContext:
    deployment = DeploymentID(name=name, app_name="mutoscope")
    replicas = [ReplicaID(str(number), deployment) for number in range(current)]
    return AutoscalingContext(
        **{
            "deployment_id": deployment,
            "deployment_name": name,
            "app_name": "mutoscope",
            "current_num_replicas": current,
            "target_num_replicas": current,
            "running_replicas": replicas,
            "total_num_requests": 0,
            "total_queued_requests": 0,
            "aggregated_metrics": {},
            "raw_metrics": {},
            "capacity_adjusted_min_replicas": 0,
            "capacity_adjusted_max_replicas": 8,
            "policy_state": {},
            "last_scale_up_time": None,
            "last_scale_down_time": None,
            "current_time": 0.0,
            "config": AutoscalingConfig(
                min_replicas=0,
                max_replicas=8,
                upscale_delay_s=0,
                downscale_delay_s=300,
                downscale_to_zero_delay_s=600,
            ),
            **changes,
        }
    )


def pipeline(wanted: dict[str, float], replicas: int = 2) -> AutoscalingContext:
    """Every replica of the pipeline tells the same."""
    told = context("VideoPipeline", replicas)
    by_replica = {
        WANTED + name: dict.fromkeys(told.running_replicas, count) for name, count in wanted.items()
    }
    return context("VideoPipeline", replicas, aggregated_metrics=by_replica)


def decide(*contexts: AutoscalingContext) -> dict[str, float]:
    replicas, states = ByDemand()({entry.deployment_id: entry for entry in contexts})
    assert all(isinstance(state, dict) for state in states.values())
    return {deployment.name: count for deployment, count in replicas.items()}


def test_what_two_pipelines_tell_counts_once() -> None:
    found = decide(pipeline({DENOISER: 3.0, DECODER: 2.0}), context(DENOISER, 1))
    assert found[DENOISER] == 3
    assert decide(pipeline({DENOISER: 3.0}, replicas=4), context(DENOISER, 1))[DENOISER] == 3


def test_a_mean_over_a_while_is_rounded() -> None:
    assert decide(pipeline({DENOISER: 0.4}), context(DENOISER, 1))[DENOISER] == 0
    assert decide(pipeline({DENOISER: 1.5}), context(DENOISER, 1))[DENOISER] == 2


def test_a_pool_that_nobody_tells_of_stays_as_it_is() -> None:
    found = decide(pipeline({}), context(DENOISER, 3), context("MediaEncoder", 1))
    assert DENOISER not in found
    assert found["MediaEncoder"] == 0  # Serve's own: nobody asks it for anything


def test_other_deployments_are_scaled_by_their_requests() -> None:
    busy = context("TextEncoder", 1, total_num_requests=6)
    assert decide(pipeline({}), busy)["TextEncoder"] == 3


def test_serve_applies_its_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up at once, down after 300 s of wanting less, to zero after another 600."""
    wrapped = serve_policy._apply_app_level_autoscaling_config(ByDemand())
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    current, seen = 1, []
    state: dict[str, Any] = {}
    for second in range(0, 1400, 10):
        now[0] = float(second)
        wanted = 4.0 if second < 100 else 0.0
        contexts = {
            entry.deployment_id: entry
            for entry in (
                pipeline({DENOISER: wanted}),
                context(DENOISER, current, policy_state=state),
            )
        }
        replicas, states = wrapped(contexts)
        deployment = DeploymentID(name=DENOISER, app_name="mutoscope")
        state = states[deployment]
        if replicas[deployment] != current:
            current = replicas[deployment]
            seen.append((second, current))
    assert seen == [(0, 4), (400, 1), (1010, 0)]


def test_who_waits_for_a_pool_without_replicas_gets_one_at_once() -> None:
    wrapped = serve_policy._apply_app_level_autoscaling_config(ByDemand())
    waiting = context(DENOISER, 0, total_num_requests=1)
    told = pipeline({DENOISER: 0.0})
    replicas, _ = wrapped({entry.deployment_id: entry for entry in (told, waiting)})
    assert replicas[waiting.deployment_id] == 1
    # and as many as are wanted, before the first of them works
    told = pipeline({DENOISER: 4.0})
    replicas, _ = wrapped({entry.deployment_id: entry for entry in (told, waiting)})
    assert replicas[waiting.deployment_id] == 4
