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
    """What a gate says: deploy, do not, or nobody knows."""

    ACCEPT = "ACCEPT"
    REJECT = "REJECT"
    NO_VERDICT = "NO VERDICT"


EXIT_CODE = {Outcome.ACCEPT: 0, Outcome.REJECT: 3, Outcome.NO_VERDICT: 4}


State = Literal["within", "off", "unclear", "few"]
Decision = Literal["interval", "value"]


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
    decided_by: Decision = "interval"

    @property
    def state(self) -> State:
        """On which side of the limit the interval lies; the value itself where there is none.

        An interval that straddles the limit is `unclear`, and one from too few samples `few`,
        unless it lies beyond the limit as a whole. A value that is nan is always `off`.
        """
        if math.isnan(self.value):
            return "off"
        best, worst = self._span()
        if not self._reaches(best):
            return "off"
        if self.samples is not None and self.samples < self.needed_samples:
            return "few"
        return "within" if self._reaches(worst) else "unclear"

    @property
    def where(self) -> str:
        """Subject and runtime, for people."""
        return ", ".join(part for part in (self.subject, self.runtime) if part)

    @property
    def label(self) -> str:
        """Its name, and of what and where it is."""
        return f"{self.name} ({self.where})" if self.where else self.name

    def _span(self) -> tuple[float, float]:
        """The most and the least favourable end of what the value may be."""
        if self.decided_by == "value" or self.low is None or self.high is None:
            return self.value, self.value
        return (self.low, self.high) if self.relation == "<=" else (self.high, self.low)

    def _reaches(self, value: float) -> bool:
        return value <= self.limit if self.relation == "<=" else value >= self.limit


@dataclass(frozen=True, slots=True)
class Limit:
    """What a measured rate is held against."""

    name: str
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    needed_samples: int
    decided_by: Decision = "interval"

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
            self.decided_by,
        )


def judge(checks: Iterable[Check], required: AbstractSet[str]) -> Outcome:
    """REJECT if any check is off its limit; NO_VERDICT if evidence is missing or unclear.

    Missing is a required check that was not made, or on too few samples. Unclear is any check,
    required or not, whose confidence interval straddles its limit.
    """
    made = tuple(checks)
    if any(check.state == "off" for check in made):
        return Outcome.REJECT
    if missing(made, required) or any(check.state == "unclear" for check in made):
        return Outcome.NO_VERDICT
    return Outcome.ACCEPT


def missing(checks: Iterable[Check], required: AbstractSet[str]) -> tuple[str, ...]:
    """The required checks that were not made, or on too few samples."""
    made = tuple(checks)
    return tuple(sorted(
        name for name in required
        if not any(c.name == name for c in made)
        or any(c.name == name and c.state == "few" for c in made)
    ))  # fmt: skip


def explain(
    checks: Iterable[Check], required: AbstractSet[str], *, absent: Mapping[str, str]
) -> tuple[str, ...]:
    """One line for each reason that stands against acceptance, the worst first.

    Args:
        absent: Why a check could not be made, by its name, where that is known.
    """
    made = tuple(checks)
    off = [describe(check) for check in made if check.state == "off"]
    unclear = [describe(check) for check in made if check.state == "unclear"]
    few = {c.name: c.samples for c in made if c.state == "few"}
    gaps = []
    for name in missing(made, required):
        why = f"only {few[name]} images" if name in few else absent.get(name, "not measured")
        gaps.append(f"{name} is required: {why}")
    return (*off, *unclear, *gaps)


def describe(check: Check) -> str:
    """One line: what was measured, and how it stands to the limit."""
    head = f"{check.label}: "
    value = f"{check.value:.4g} {check.unit}"
    if check.state == "off":
        side = "above" if check.relation == "<=" else "below"
        return f"{head}{value}, {side} the limit of {check.limit:g}"
    if check.state == "unclear":
        return (
            f"{head}{value}, but with {check.samples:,} samples it may be {check.low:.2f} to"
            f" {check.high:.2f}, and the limit is {check.limit:g}"
        )
    if check.state == "few":
        return f"{head}{value}, on {check.samples} images of {check.needed_samples} needed"
    return f"{head}{value}, within the limit of {check.limit:g}"
