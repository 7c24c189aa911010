"""What the account and key routes take as JSON; an unknown field is refused by name."""

from pydantic import BaseModel, Field

from credits.plans import Plan

MAX_AMOUNT = 10**12
TEN_YEARS_S = 315_360_000
NO_CONTROL = r"^[^\x00-\x1f\x7f]*$"


class KeyBody(BaseModel, frozen=True, extra="forbid"):
    """A key to make; without expires_in_s it never ends by itself."""

    name: str = Field("", max_length=100, pattern=NO_CONTROL)
    expires_in_s: int | None = Field(None, ge=1, le=TEN_YEARS_S)


class AccountBody(BaseModel, frozen=True, extra="forbid"):
    """An account to make, with its first credits and its first key."""

    name: str = Field(min_length=1, max_length=100, pattern=NO_CONTROL)
    plan: Plan
    credits: int = Field(0, ge=0, le=MAX_AMOUNT)


class AccountChange(BaseModel, frozen=True, extra="forbid"):
    """What is to be changed: the fields that are there. max_jobs null: as the plan says."""

    plan: Plan = Plan.FREE
    max_jobs: int | None = Field(None, ge=0, le=10**6)
    disabled: bool = False


class GrantBody(BaseModel, frozen=True, extra="forbid"):
    """Credits to give; why, for the audit log."""

    amount: int = Field(ge=1, le=MAX_AMOUNT)
    reason: str = Field("", max_length=200, pattern=NO_CONTROL)
