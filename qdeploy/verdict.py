"""Checks and what follows from them. Pure: no measuring, no files, no terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from qdeploy.core.metrics import Estimate


class Outcome(Enum):
    ACCEPT = "ACCEPT"
    REJECT = "REJECT"
    NO_VERDICT = "NO VERDICT"


EXIT_CODE = {Outcome.ACCEPT: 0, Outcome.REJECT: 3, Outcome.NO_VERDICT: 4}


@dataclass(frozen=True, slots=True)
class Check:
    """A measured value and its limit."""

    name: str
    value: float
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    runtime: str | None = None
    subject: str | None = None  # the trigger, where there can be several
    samples: int | None = None  # None where nothing was sampled
    needed_samples: int = 0
    low: float | None = None  # 95 % confidence interval of the value
    high: float | None = None

    @property
    def within(self) -> bool:
        """The value is on the right side of its limit; nan never is."""
        if math.isnan(self.value):
            return False
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    @property
    def conclusive(self) -> bool:
        """Enough was sampled for the value to mean something."""
        return self.samples is None or self.samples >= self.needed_samples


@dataclass(frozen=True, slots=True)
class Limit:
    """What a measured rate is held against."""

    name: str
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    needed_samples: int

    def check(self, rate: Estimate, runtime: str, subject: str | None = None) -> Check:
        """The rate beside its limit."""
        return Check(
            self.name,
            rate.value,
            self.relation,
            self.limit,
            self.unit,
            runtime,
            subject,
            rate.samples,
            self.needed_samples,
            rate.low,
            rate.high,
        )


def judge(checks: Iterable[Check], required: AbstractSet[str]) -> Outcome:
    """REJECT if any check is off its limit, NO_VERDICT if one that is required is missing.

    A required check that was made on too few samples counts as missing, but one that is off its
    limit rejects however few they were.
    """
    made = tuple(checks)
    if any(not check.within for check in made):
        return Outcome.REJECT
    if missing(made, required):
        return Outcome.NO_VERDICT
    return Outcome.ACCEPT


def missing(checks: Iterable[Check], required: AbstractSet[str]) -> tuple[str, ...]:
    """The required checks that were not made, or not conclusively."""
    made = tuple(checks)
    return tuple(sorted(
        name for name in required
        if not any(c.name == name for c in made)
        or any(c.name == name and not c.conclusive for c in made)
    ))  # fmt: skip


def explain(
    checks: Iterable[Check], required: AbstractSet[str], *, absent: Mapping[str, str]
) -> tuple[str, ...]:
    """One line for each reason that stands against acceptance, the worst first.

    Args:
        absent: Why a check could not be made, by its name, where that is known.
    """
    made = tuple(checks)
    off = [_off(check) for check in made if not check.within]
    few = {c.name: c.samples for c in made if not c.conclusive}
    gaps = []
    for name in missing(made, required):
        why = f"only {few[name]} images" if name in few else absent.get(name, "not measured")
        gaps.append(f"{name} is required: {why}")
    return (*off, *gaps)


def _off(check: Check) -> str:
    where = ", ".join(part for part in (check.subject, check.runtime) if part)
    side = "above" if check.relation == "<=" else "below"
    return (
        f"{check.name}{f' ({where})' if where else ''}: {check.value:.4g} {check.unit}, "
        f"{side} the limit of {check.limit:g}"
    )
