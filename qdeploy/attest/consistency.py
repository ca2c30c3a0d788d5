"""Whether a verdict follows from the checks that it says it rests on. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, Protocol, runtime_checkable

from qdeploy.judging.verdict import Check, Decision, judge
from qdeploy.settings.checks import CHECKS

RULES_VERSION = 2
"""Raised whenever a check comes to mean another thing, or a new one is required by default."""


@runtime_checkable
class SaidCheck(Protocol):
    """A check as a report or an attestation says it."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float | None: ...
    @property
    def relation(self) -> Literal["<=", ">="]: ...
    @property
    def limit(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def runtime(self) -> str | None: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def needed_samples(self) -> int: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def decided_by(self) -> Decision: ...
    @property
    def holds(self) -> bool: ...


def contradictions(
    outcome: str, said: Sequence[SaidCheck], required: AbstractSet[str]
) -> Iterator[str]:
    """What in a verdict cannot be so, one line each; nothing if it follows from its checks."""
    unknown = sorted({check.name for check in said} - CHECKS.keys())
    if unknown:
        yield f"{unknown[0]!r} is no check of this program"
        return
    for check in said:
        row = CHECKS[check.name]
        if check.relation != row.relation or (check.unit != row.unit and not row.of_budget):
            yield (
                f"{check.name} is said to be held to {check.relation} in {check.unit}, and it is"
                f" {row.relation} in {row.unit}"
            )
        state = again(check).state
        if (state == "within") is not check.holds:
            says = "within its limit" if check.holds else "not within its limit"
            yield f"{check.name} is said to be {says}, and by its own numbers it is {state}"
    follows = judge((again(check) for check in said), required).value
    if follows != outcome:
        yield f"the outcome is said to be {outcome}, and from its checks follows {follows}"
    if outcome == "ACCEPT" and not required:
        yield "nothing was required, so that ACCEPT says nothing"


def again(said: SaidCheck) -> Check:
    """The check, made anew from its numbers."""
    return Check(
        said.name, math.nan if said.value is None else said.value, said.relation, said.limit,
        said.unit, said.runtime, said.subject, said.samples, said.needed_samples,
        low=said.low, high=said.high, decided_by=said.decided_by,
    )  # fmt: skip
