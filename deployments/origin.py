"""Refuses to run on another project's packages; imports nothing of ours, so that it can tell."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "autoscaling",
    "credits",
    "deployments",
    "jobs",
    "media",
    "migrations",
    "models",
    "parallel",
)


class ForeignPackage(Exception):
    """A package of another project shadows one of ours."""

    def __init__(self, package: str, found: str) -> None:
        super().__init__(package, found)
        self.package, self.found = package, found

    def __str__(self) -> str:
        return (
            f"the package {self.package!r} would be imported from {self.found}, not from "
            f"{ROOT / self.package}: start Ray with PYTHONPATH={ROOT}"
        )


def check_origin() -> None:
    """Raise ForeignPackage if one of our packages would come from elsewhere.

    A `models/` in the folder where `ray start` ran precedes ours on the path and would win.
    """
    for package in PACKAGES:
        spec = find_spec(package)
        found = None if spec is None else spec.origin
        if found is None or Path(found).resolve().parent != ROOT / package:
            raise ForeignPackage(package, str(found))
