"""Whether evidence is evidence: checks that the test images and triggers at hand cannot carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from qdeploy.inputs.opened import Evidence
from qdeploy.inputs.sources import CARD
from qdeploy.judging.rates import ArmRates
from qdeploy.judging.verdict import Check
from qdeploy.settings.checks import that_need
from qdeploy.settings.policy import GateSpec
from qdeploy.values import DataUsed

BY_LABELS, BY_TRIGGERS = that_need("labels"), that_need("trigger")
OF_THE_CARD = "come from the model's own card"
NO_LABELS = "the test images have no labels"
BY_IMAGES = that_need("test data")


def objections(
    evidence: Evidence, rates: Sequence[ArmRates], classes: int, gate: GateSpec
) -> dict[str, str]:
    """Why a check says nothing, by its name.

    Args:
        rates: Of every file; the float model's where there is one.
    """
    found: dict[str, str] = {}
    labels = evidence.images.labels if evidence.images is not None else None
    if not evidence.labelled and labels is not None:
        found |= dict.fromkeys(sorted(BY_LABELS), NO_LABELS)
        if len(np.unique(labels)) == 1:
            same = f"the float model gives all {len(labels):,} images the same answer"
            found |= dict.fromkeys(sorted(BY_IMAGES), same)
    elif labels is not None and rates:
        reason = _too_few_classes(labels, classes) or _at_chance(labels, rates)
        if reason is not None:
            found |= dict.fromkeys(sorted(BY_LABELS), reason)
    if gate.independent_evidence:
        found |= dict(_from_the_card(evidence.used))
    return found


def sound(
    checks: Sequence[Check], objected: Mapping[str, str], evidence: Evidence
) -> tuple[Check, ...]:
    """The checks that the evidence carries; one that is off stands even so, if there are labels."""
    made = (c for c in checks if evidence.labelled or c.name not in BY_LABELS)
    return tuple(c for c in made if c.name not in objected or c.state == "off")


def _from_the_card(used: Sequence[DataUsed]) -> Iterator[tuple[str, str]]:
    roles = {data.role for data in used if data.given_by == CARD}
    wanted = f"{OF_THE_CARD}, and the policy wants independent evidence"
    if "trigger" in roles:
        reason = f"the triggers {wanted}: give --trigger"
        yield from dict.fromkeys(sorted(BY_TRIGGERS), reason).items()
    if "test" in roles:
        reason = f"the test data {wanted}: give --test"
        yield from dict.fromkeys(sorted(BY_IMAGES), reason).items()


def _too_few_classes(labels: Int64[np.ndarray, " images"], classes: int) -> str | None:
    """There is one class, or less than half of those that there could be."""
    covered = len(np.unique(labels))
    if covered == 1 and classes > 1:
        return f"all {len(labels):,} test images are of class {labels[0]}"
    if 2 * covered < min(classes, len(labels)):
        return f"there are test images of {covered} of {classes} classes, not of half of them"
    return None


def _at_chance(labels: Int64[np.ndarray, " images"], rates: Sequence[ArmRates]) -> str | None:
    """The float model, or else the file, does no better than always the same answer would."""
    floats = [arm for arm in rates if arm.arm.variant == "fp32"]
    asked = (floats or [arm for arm in rates if arm.arm.variant == "result"])[0]
    share = 100 * float(np.bincount(labels).max()) / len(labels)
    if asked.accuracy.low > share:
        return None
    whom = "float model" if floats else "file"
    return (
        f"the labels fit the {whom} no better than chance: {asked.accuracy.value:.1f} % of"
        f" {len(labels):,}, and {share:.1f} % are of the largest class"
    )
