"""What a process with weights says of how it computes them, in Ray's log of that process."""

import logging


def log_choices() -> None:
    """Show what `models` logs: the type of numbers, the attention, how weights are kept."""
    logger = logging.getLogger("models")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
