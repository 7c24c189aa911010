"""Whether a checkpoint may be offered where, and for what, this is operated."""

from pydantic import BaseModel

from models.catalog import Model
from models.territories import EUROPEAN_UNION, Territory


class OperationConfig(BaseModel, frozen=True, extra="forbid"):
    """territories: ISO 3166-1 codes of the countries whose users are served; commercial: whether
    they pay for it.
    """

    territories: frozenset[Territory] = frozenset()
    commercial: bool = True


class LicenceForbids(Exception):
    """A checkpoint's licence does not allow what this deployment is for."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.reason}. If you hold another licence, say which in the model's "
            "`licence_override`"
        )


def check_licence(model: Model, operation: OperationConfig) -> None:
    """LicenceForbids if the licence excludes a territory or the use, or if an excluded territory
    can't be ruled out.
    """
    manifest = model.manifest
    if operation.commercial and not manifest.commercial_use:
        raise LicenceForbids(model.id, f"{manifest.licence} is for non-commercial use")
    if not manifest.territory_exclusions:
        return
    excluded: set[str] = {*manifest.territory_exclusions}
    named = ", ".join(sorted(excluded))
    if "EU" in excluded:
        excluded |= EUROPEAN_UNION
    if not operation.territories:
        reason = f"{manifest.licence} excludes {named}: name your `operation.territories`"
        raise LicenceForbids(model.id, reason)
    if found := sorted(operation.territories & excluded):
        raise LicenceForbids(model.id, f"{manifest.licence} excludes {', '.join(found)} ({named})")
