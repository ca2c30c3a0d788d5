"""What can be done about a verdict that is not ACCEPT. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from qdeploy.judging.verdict import Check, missing
from qdeploy.settings.checks import CHECKS, SUPPLY, Need


def next_steps(
    checks: Iterable[Check], required: AbstractSet[str], lacks: Mapping[str, Need]
) -> tuple[str, ...]:
    """One line for each thing to do, the most urgent first, none twice.

    Args:
        lacks: What a check needed and did not get, by its name.
    """
    return tuple(dict.fromkeys(_steps(tuple(checks), required, lacks)))


def _steps(
    checks: tuple[Check, ...], required: AbstractSet[str], lacks: Mapping[str, Need]
) -> Iterator[str]:
    for check in checks:
        if check.state == "off":
            yield f"{check.name}: {CHECKS[check.name].then}"
    for name in missing(checks, required):
        few = [check for check in checks if check.name == name and check.state == "few"]
        if few:
            yield f"{name}: give more test images, at least {few[0].needed_samples:,}"
        elif name in lacks:
            yield f"{name}: {SUPPLY[lacks[name]]}"
    for check in checks:
        if check.state == "unclear":
            yield f"{check.name}: give more test images, until its interval lies on one side"
