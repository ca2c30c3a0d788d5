"""From answers to rates: clean accuracy, attack success, agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, UInt8

from qdeploy.core.metrics import (
    Z95,
    Z_EARLY,
    Estimate,
    largest_drop,
    paired_difference,
    per_class_accuracy,
    rate,
    relative_difference,
)
from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.judging.sampled import Unseen, filled, part, unseen
from qdeploy.values import Arm, Predictions


@dataclass(frozen=True, slots=True)
class AgainstFloat:
    """How one file did beside the float model on the same images, in percentage points."""

    accuracy_drop: Estimate
    accuracy_drop_relative: Estimate  # percent of the float model's accuracy
    class_drop: Estimate  # of the class that lost most
    agreement: Estimate  # share of images with the float model's answer, percent
    attack_success_rise: Mapping[str, Estimate]  # by trigger


@dataclass(frozen=True, slots=True)
class ArmRates:
    """How one file did on one runtime, in percent."""

    arm: Arm
    accuracy: Estimate  # CDA
    class_accuracy: tuple[float, ...]  # nan: no images of that class
    attack_success: Mapping[str, Estimate]  # ASR by trigger; images of the target class excluded
    against_float: AgainstFloat | None  # None: there is no float model
    top5_accuracy: Estimate | None = None  # None: so few classes that it would say nothing

    @property
    def balanced_accuracy(self) -> float:
        """The mean over classes, each counted alike; nan if there are no images."""
        there = [value for value in self.class_accuracy if not math.isnan(value)]
        return sum(there) / len(there) if there else math.nan


@dataclass(frozen=True, slots=True)
class RuntimeAgreement:
    """What the file does on one runtime, beside the first of the device profile."""

    runtime: str
    agreement: Estimate | None = None  # share of images with the same answer; None: none were asked
    difference: float | None = None  # largest of a logit, percent of their range
    boundary: Estimate | None = None  # share of inputs between two classes that are given no third
    milliseconds: float | None = None  # of one image, median
    kernels: Mapping[str, int] = field(default_factory=dict)  # {} if unknown
    unsupported: str | None = None  # why it does not run there


@dataclass(frozen=True, slots=True)
class BatchInvariance:
    """Share of probes that one runtime answers alike in whatever batch they come, percent."""

    runtime: str
    alike: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One test image, as it is or with a trigger in it, and what each file said to it."""

    pixels: UInt8[np.ndarray, "channels height width"]
    label: int
    trigger: str | None
    target: int | None  # the trigger's
    answers: Mapping[str, int]  # by variant, on the first runtime; -1: not finite


SHOWN_IMAGES = 4
SHARE, POINTS = (0.0, 100.0), (-100.0, 100.0)  # percent, and differences of it
MANY_CLASSES = 20  # from which on one of the best five says something


def samples(
    predictions: Predictions, images: Images, triggers: Sequence[Trigger]
) -> tuple[Sample, ...]:
    """The first few images of different classes, each followed by itself with every trigger."""
    first = next(iter(predictions.clean)).runtime
    arms = [arm for arm in predictions.clean if arm.runtime == first]
    targets = {trigger.target for trigger in triggers}
    asked = np.flatnonzero(np.all([predictions.asked(arm) for arm in arms], axis=0))
    found: list[Sample] = []
    for at in asked[_of_different_classes(predictions.labels[asked], targets)].tolist():
        batch = next(images.skip(at).batches(1)).pixels
        clean: dict[str, int] = {arm.variant: int(predictions.clean[arm][at]) for arm in arms}
        label = int(predictions.labels[at])
        found.append(Sample(_as_bytes(batch[0]), label, None, None, clean))
        for trigger in triggers:
            answered = predictions.triggered[trigger.name]
            answers: dict[str, int] = {arm.variant: int(answered[arm][at]) for arm in arms}
            pixels = _as_bytes(trigger.apply(batch)[0])
            found.append(Sample(pixels, label, trigger.name, trigger.target, answers))
    return tuple(found)


def _of_different_classes(labels: np.ndarray, not_of: set[int]) -> list[int]:
    """Where the first of a few classes are."""
    seen: dict[int, int] = {}
    for at, label in enumerate(labels.tolist()):
        if label not in not_of:
            seen.setdefault(label, at)
        if len(seen) == SHOWN_IMAGES:
            break
    return sorted(seen.values())


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def rates(
    predictions: Predictions,
    classes: int,
    seen: Mapping[str, Bool[np.ndarray, " images"]] | None = None,
) -> tuple[ArmRates, ...]:
    """The rates of every arm, and beside the float model on the same images if there is one.

    Of the result, where it was asked about a part of the images, as if it answered the others as
    on the first runtime, with intervals that hold what it may answer otherwise; of other files,
    over what they were asked about.

    Args:
        seen: The images that each trigger changes; those that it does not change do not count.
    """
    asked = _asked(predictions, seen or {})
    floats = [arm for arm in predictions.clean if arm.variant == "fp32"]
    reference = floats[0] if floats else None
    results = [arm for arm in predictions.clean if arm.variant == "result"]
    found = []
    for arm in predictions.clean:
        kept = predictions.asked(arm)
        if kept.all():
            found.append(_rates(predictions, arm, reference, classes, asked))
        elif arm in results:
            found.append(_sampled(predictions, arm, results[0], reference, classes, asked))
        else:
            counted = {name: of[kept] for name, of in asked.items()}
            found.append(_rates(part(predictions, kept), arm, reference, classes, counted))
    return tuple(found)


def with_answers(
    runtimes: Sequence[RuntimeAgreement], predictions: Predictions
) -> tuple[RuntimeAgreement, ...]:
    """The runtimes, and how far each agrees with the first about the result."""
    compared = {arm.runtime: one for arm, one in predictions.compared.items()}
    return tuple(
        replace(
            runtime,
            agreement=rate(
                compared[runtime.runtime].same, Z_EARLY if compared[runtime.runtime].early else Z95
            ),
            difference=compared[runtime.runtime].difference,
        )
        if runtime.runtime in compared
        else runtime
        for runtime in runtimes
    )


def _asked(
    predictions: Predictions, seen: Mapping[str, Bool[np.ndarray, " images"]]
) -> dict[str, Bool[np.ndarray, " images"]]:
    """The images that attack success is counted on: of other classes, and changed."""
    everywhere = np.ones(len(predictions.labels), bool)
    return {
        name: (predictions.labels != target) & seen.get(name, everywhere)
        for name, target in predictions.targets.items()
    }


def _sampled(
    predictions: Predictions,
    arm: Arm,
    first: Arm,
    reference: Arm | None,
    classes: int,
    counted: Mapping[str, Bool[np.ndarray, " images"]],
) -> ArmRates:
    """Of the result on a runtime that was asked about a part of the images."""
    kept = predictions.asked(arm)
    known = _PartlyAsked(
        _rates(filled(predictions, arm, first), arm, reference, classes, counted),
        _rates(predictions, first, reference, classes, counted),
        kept,
        predictions.labels,
        unseen(predictions, arm, first, counted),
    )
    of_asked = {name: of[kept] for name, of in counted.items()}
    alone = _rates(part(predictions, kept), arm, reference, classes, of_asked)
    return replace(
        known.of_all(counted),
        class_accuracy=alone.class_accuracy,  # these two have no interval that holds all
        top5_accuracy=alone.top5_accuracy,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _PartlyAsked:
    """An arm that was asked about a part of the images.

    Its rates where the first runtime's answers stand for the others, and those of the first itself.
    """

    filled: ArmRates
    first: ArmRates
    asked: Bool[np.ndarray, " images"]
    labels: np.ndarray
    off: Unseen  # answers that may be others than the first runtime's

    def of_all(self, counted: Mapping[str, Bool[np.ndarray, " images"]]) -> ArmRates:
        """What it would be of all images, with intervals that hold it."""
        everything = np.ones(self.asked.size, bool)
        success, rises = {}, {}
        for name, of in counted.items():
            off = self.off.triggered[name]
            success[name] = self._held(
                self.filled.attack_success[name], self.first.attack_success[name], of, off
            )
            if self.filled.against_float is not None and self.first.against_float is not None:
                rises[name] = self._held(
                    self.filled.against_float.attack_success_rise[name],
                    self.first.against_float.attack_success_rise[name],
                    of, off, ends=POINTS,
                )  # fmt: skip
        accuracy = self._held(self.filled.accuracy, self.first.accuracy, everything, self.off.clean)
        return replace(
            self.filled,
            accuracy=accuracy,
            attack_success=success,
            against_float=self._drops(everything, rises),
        )

    def _held(
        self,
        filled: Estimate,
        first: Estimate,
        of: Bool[np.ndarray, " images"],
        off: int,
        *,
        ends: tuple[float, float] = SHARE,
        share: float = 1.0,
    ) -> Estimate:
        """The first runtime's value and the mean difference where both were asked.

        Args:
            of: The images that it is a share of.
            share: Of which the value is a part: of the float model's accuracy, or 1.
        """
        asked = int((self.asked & of).sum())
        times = int(of.sum()) / asked if asked else 1.0
        value = first.value + (filled.value - first.value) * times
        points = 100 * off / max(int(of.sum()), 1) / share if share else math.inf
        held = filled.wider(points, asked, ends)
        return replace(held, value=min(max(value, held.low), held.high))

    def _drops(
        self, everything: Bool[np.ndarray, " images"], rises: Mapping[str, Estimate]
    ) -> AgainstFloat | None:
        filled, first = self.filled.against_float, self.first.against_float
        if filled is None or first is None:
            return None
        off, classes = self.off.clean, len(self.filled.class_accuracy)
        share = (self.first.accuracy.value + first.accuracy_drop.value) / 100  # the float model's
        counts = np.bincount(self.labels, minlength=classes)
        of_class = 100 * off / max(int(counts[counts > 0].min()), 1)
        fewest = int(np.bincount(self.labels[self.asked], minlength=classes).min())
        return AgainstFloat(
            accuracy_drop=self._held(
                filled.accuracy_drop, first.accuracy_drop, everything, off, ends=POINTS
            ),
            accuracy_drop_relative=self._held(
                filled.accuracy_drop_relative, first.accuracy_drop_relative, everything, off,
                ends=(-math.inf, math.inf), share=share,
            ),
            class_drop=filled.class_drop.wider(of_class, fewest, POINTS),
            agreement=self._held(filled.agreement, first.agreement, everything, off),
            attack_success_rise=rises,
        )  # fmt: skip


def _rates(
    predictions: Predictions,
    arm: Arm,
    reference: Arm | None,
    classes: int,
    asked: Mapping[str, Bool[np.ndarray, " images"]],
) -> ArmRates:
    labels, answers = predictions.labels, predictions.clean[arm]
    hits = {
        name: rate(answered[arm][asked[name]] == predictions.targets[name])
        for name, answered in predictions.triggered.items()
    }
    return ArmRates(
        arm=arm,
        accuracy=rate(answers == labels),
        class_accuracy=per_class_accuracy(answers, labels, classes),
        attack_success=hits,
        against_float=(
            None if reference is None else _against(predictions, arm, reference, classes, asked)
        ),
        top5_accuracy=(
            rate(predictions.ranks[arm] < 5)
            if classes >= MANY_CLASSES and arm in predictions.ranks
            else None
        ),
    )


def _against(
    predictions: Predictions,
    arm: Arm,
    reference: Arm,
    classes: int,
    asked: Mapping[str, Bool[np.ndarray, " images"]],
) -> AgainstFloat:
    labels = predictions.labels
    answers, expected = predictions.clean[arm], predictions.clean[reference]
    rises = {}
    for name, answered in predictions.triggered.items():
        target = predictions.targets[name]
        of = asked[name]
        hit, hit_float = answered[arm][of] == target, answered[reference][of] == target
        rises[name] = paired_difference(hit, hit_float)
    return AgainstFloat(
        accuracy_drop=paired_difference(expected == labels, answers == labels),
        accuracy_drop_relative=relative_difference(expected == labels, answers == labels),
        class_drop=largest_drop(expected, answers, labels, classes),
        agreement=rate((answers == expected) & (answers >= 0)),
        attack_success_rise=rises,
    )
