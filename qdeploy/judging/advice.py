"""What can be done about a verdict that is not ACCEPT. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from qdeploy.judging.verdict import Check, missing
from qdeploy.settings.checks import CHECKS


def next_steps(
    checks: Iterable[Check], required: AbstractSet[str], supply: Mapping[str, str]
) -> tuple[str, ...]:
    """One line for each thing to do and the checks that it is for, the most urgent first.

    Args:
        supply: What to give for a check that could not be made, by its name.
    """
    whom: dict[str, dict[str, None]] = {}
    for name, step in _steps(tuple(checks), required, supply):
        whom.setdefault(step, {})[name] = None
    return tuple(f"{', '.join(names)}: {step}" for step, names in whom.items())


def _steps(
    checks: tuple[Check, ...], required: AbstractSet[str], supply: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Check and step."""
    for check in checks:
        if check.state == "off":
            yield check.name, CHECKS[check.name].then
    for name in missing(checks, required):
        few = [check for check in checks if check.name == name and check.state == "few"]
        if few:
            yield name, f"give more test images, at least {few[0].needed_samples:,}"
        elif name in supply:
            yield name, supply[name]
    for check in checks:
        if check.state == "unclear":
            yield check.name, "give more test images, until the interval lies on one side"
