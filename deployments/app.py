"""What serve_config.yaml names: from its `args` to the application that Serve runs.

It imports the rest only when called, after the check that the rest is ours.
"""

from typing import Any

from ray.serve import Application

from deployments.origin import check_origin


def build(args: dict[str, Any]) -> Application:
    """Validate the configuration (`deployments.config.AppConfig`) and bind every deployment."""
    check_origin()
    from deployments.chain import bind_chain
    from deployments.config import AppConfig

    return bind_chain(AppConfig.model_validate(args))
