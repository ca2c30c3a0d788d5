"""A backdoor that only the quantized file has, found without its trigger.

The search of `qdeploy.core.differential` runs in torch, on the file's own integers and the float
model; what is reported is measured afterwards, on held-out images saved with 8 bits a pixel, by the
runtime that executes both files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32

from qdeploy.core.metrics import Estimate, rate
from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.detectors.known import Detected, NotLookedAt, Run, Suspect
from qdeploy.errors import PlanError, QdeployError, foreign_reader
from qdeploy.formats.onnx.saturation import saturable
from qdeploy.machine import has_torch
from qdeploy.progress import SILENT, Progress
from qdeploy.values import named_classes

if TYPE_CHECKING:
    from qdeploy.core.differential import Candidate

PICTURES = 500  # at most, for search and score together
FEWEST = 40
HELD_OUT = 0.4  # share of them that the search does not see
MEASURED_SLOWLY = 3  # perturbations that an emulation is asked about, those with most success
SHOWN = 4  # pictures on the page
READ = 64  # images at a time
EXACT, SATURATING = "exact", "where pairs of products saturate"  # the file's arithmetic
LEAST_FIDELITY = 80.0  # percent; activations are not rounded in the search

Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Lead:
    """What one perturbation does on held-out images."""

    target: int
    kind: str
    size: float  # share of the largest of its kind
    led: Estimate  # percent of images that go to the target in one model and not in the other
    trigger: Trigger

    def described(self, names: Sequence[str]) -> str:
        """In a few words."""
        return f"{named_classes((self.target,), names)} by {self.kind} of size {self.size:.3g}"


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A held-out image, perturbed, and what both models say of it."""

    plain: Float32[np.ndarray, "channels height width"]
    perturbed: Float32[np.ndarray, "channels height width"]
    answers: tuple[int, int]  # of the file: plain, perturbed
    float_answers: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Differential:
    """What leads the file to a class and its float model not, and the other way round."""

    best: Lead
    null: Lead  # the same with the models exchanged: how far any two of this kind differ
    others: tuple[Lead, ...]  # the best of each other class that was searched in full
    screened: int  # classes
    classes: int
    pictures: int  # that were searched with
    fidelity: float  # percent of answers that the search's own arithmetic has as the runtime
    seconds: float
    shown: tuple[Shown, ...]
    arithmetic: str = EXACT  # by which the best leads

    def described(self, names: Sequence[str]) -> str:
        """The best, in a few words."""
        where = "" if self.arithmetic == EXACT else f" {self.arithmetic}"
        return f"{self.best.described(names)}{where}"

    @property
    def coverage(self) -> str:
        """How many classes were looked at."""
        return f"{self.screened:,} of {self.classes:,} classes"


def detect(suspect: Suspect, progress: Progress = SILENT) -> Detected | NotLookedAt:
    """The perturbation that leads most held-out images in the file and not in the float model.

    A file that answers otherwise where pairs of products saturate is searched there too, if it is
    for processors that do so.
    """
    reason = _missing(suspect)
    if reason is not None:
        return NotLookedAt(reason)
    found = []
    for arithmetic, run in _places(suspect):
        try:
            with foreign_reader("cannot be searched"):
                found.append(_searched(suspect, arithmetic, run, progress))
        except QdeployError as error:
            where = "" if arithmetic == EXACT else f", {arithmetic}"
            return NotLookedAt(f"{error}{where}")
    best = max(found, key=lambda one: one.best.led.value)
    null = max((one.null for one in found), key=lambda lead: lead.led.value)
    evidence = replace(best, null=null, seconds=sum(one.seconds for one in found))
    lead = evidence.best
    return Detected(lead.led.value, evidence.described(suspect.class_names), evidence, lead.led)


def _places(suspect: Suspect) -> Iterator[tuple[str, Run]]:
    """By which arithmetic the file is searched."""
    assert suspect.file is not None and suspect.run is not None  # noqa: S101, PT018
    yield EXACT, suspect.run
    if suspect.saturating is not None and _can_saturate(suspect.file):
        yield SATURATING, suspect.saturating


def _can_saturate(file: bytes) -> bool:
    try:
        return saturable(file, "the file").pairs > 0
    except QdeployError:
        return False  # it is not one of integers that can be told


def _searched(suspect: Suspect, arithmetic: str, run: Run, progress: Progress) -> Differential:
    """Both directions, by one arithmetic.

    Raises:
        QdeployError: it cannot be searched.
    """
    from qdeploy.detectors.differential_search import open_models, plan_of, searched

    started = time.perf_counter()
    assert suspect.pictures is not None and suspect.file is not None  # noqa: S101, PT018
    assert suspect.float_model is not None and suspect.run is not None  # noqa: S101, PT018
    seed = suspect.seed_for("differential", suspect.file)
    seek, held = _split(suspect.pictures, seed)
    logits = {"file": run(suspect.file), "float model": suspect.run(suspect.float_model.onnx)}
    score = _Score(logits, suspect.pictures, held)
    lossy, given = arithmetic == SATURATING, suspect.pictures.preprocessing
    models = open_models(suspect.file, suspect.float_model, given, saturating=lossy)
    fidelity = score.fidelity(models.answers(held))
    if fidelity < LEAST_FIDELITY:
        raise PlanError(
            f"the search's own arithmetic has only {fidelity:.0f} % of the runtime's answers"
        )
    plan = plan_of(models, seek)
    found = {
        name: sorted(searched(models, name, seek, plan, seed, progress), key=_by_success)
        for name in ("file", "float model")
    }
    if not all(found.values()):
        raise PlanError("the pictures are answered by too few classes")
    most = MEASURED_SLOWLY if lossy else None
    leads = [score.lead(candidate, "file") for candidate in found["file"][:most]]
    null = [score.lead(candidate, "float model") for candidate in found["float model"][:most]]
    best, *others = sorted(leads, key=lambda lead: -lead.led.value)
    return Differential(
        best=best,
        null=max(null, key=lambda lead: lead.led.value),
        others=tuple(others),
        screened=plan.screened,
        classes=suspect.float_model.classes,
        pictures=len(seek),
        fidelity=fidelity,
        seconds=time.perf_counter() - started,
        shown=tuple(score.shown(best)),
        arithmetic=arithmetic,
    )


def _by_success(candidate: Candidate) -> float:
    return -candidate.success


def still_led(suspect: Suspect, triggers: Sequence[Trigger]) -> float:
    """Percent of the pictures that the best of some triggers leads in the file alone; 0 for none.

    As the runtime answers, on pictures that were saved with 8 bits.
    """
    if suspect.pictures is None or suspect.float_model is None or suspect.file is None:
        return math.nan
    assert suspect.run is not None  # noqa: S101 - there is a file
    logits = {
        "file": suspect.run(suspect.file),
        "float model": suspect.run(suspect.float_model.onnx),
    }
    sample = suspect.pictures.sample(PICTURES, 0)
    pixels = np.concatenate([batch.pixels for batch in sample.batches(READ)])
    score = _Score(logits, suspect.pictures, pixels)
    return max((score.led(trigger, "file").value for trigger in triggers), default=0.0)


def _missing(suspect: Suspect) -> str | None:
    """Why there is nothing to search; None if there is."""
    if suspect.float_model is None or suspect.file is None or suspect.run is None:
        return "no reference is known"
    if suspect.off:
        return "the policy has switched it off (validation.detection)"
    if not has_torch():
        return "it needs torch, which is not installed"
    if suspect.pictures is None:
        return "no pictures that count: give --calibration"
    if len(suspect.pictures) < FEWEST:
        return f"{len(suspect.pictures)} pictures, at least {FEWEST} are needed"
    return None


def _split(images: Images, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels to search with, and those that are held out."""
    sample = images.sample(PICTURES, seed)
    pixels = np.concatenate([batch.pixels for batch in sample.batches(READ)])
    pixels = pixels[np.random.default_rng(seed).permutation(len(pixels))]
    first = round(HELD_OUT * len(pixels))
    return pixels[first:], pixels[:first]


class _Score:
    """What perturbations do on held-out images, as the runtime answers."""

    def __init__(self, logits: Mapping[str, Logits], images: Images, held: np.ndarray) -> None:
        self._logits = logits
        self._images = images
        self._held = held
        self._plain = {name: self._answers(name, held) for name in logits}

    def lead(self, candidate: Candidate, direction: str) -> Lead:
        """How many images it leads in one model and not in the other."""
        trigger = _trigger(candidate)
        size = candidate.size
        led = self.led(trigger, direction)
        return Lead(candidate.target, size.kind.NAME, size.share, led, trigger)

    def led(self, trigger: Trigger, direction: str) -> Estimate:
        """Share of images that a trigger leads in one model and not in the other."""
        return rate(self._led(trigger, direction))

    def fidelity(self, answers: Mapping[str, np.ndarray]) -> float:
        """Percent of the plain images answered as in `answers`, by the model that has fewer."""
        same = (100 * float(np.mean(answers[name] == plain)) for name, plain in self._plain.items())
        return min(same)

    def shown(self, lead: Lead) -> Iterator[Shown]:
        """A few images that go to the target in the file alone, or the first."""
        hits = np.flatnonzero(self._plain["float model"] != lead.target)
        order = np.argsort(~self._led(lead.trigger, "file"), kind="stable")
        for row in hits[order][:SHOWN]:
            plain = self._held[row]
            perturbed = _saved(lead.trigger.apply(plain[None]))
            after = [int(self._answers(name, perturbed)[0]) for name in ("file", "float model")]
            before = [int(self._plain[name][row]) for name in ("file", "float model")]
            yield Shown(plain, perturbed[0], (before[0], after[0]), (before[1], after[1]))

    def _led(self, trigger: Trigger, direction: str) -> Bool[np.ndarray, " images"]:
        """Of the images that the other model does not give the target."""
        other = "float model" if direction == "file" else "file"
        kept = self._plain[other] != trigger.target
        pixels = _saved(trigger.apply(self._held[kept]))
        led = self._answers(direction, pixels) == trigger.target
        return led & (self._answers(other, pixels) != trigger.target)

    def _answers(self, name: str, pixels: np.ndarray) -> np.ndarray:
        given, logits = self._images.preprocessing, self._logits[name]
        parts = [pixels[i : i + given.at_once] for i in range(0, len(pixels), given.at_once)]
        answers = [logits(np.ascontiguousarray(given.normalise(p))).argmax(1) for p in parts]
        return np.concatenate(answers) if answers else np.zeros(0, np.int64)


def _trigger(candidate: Candidate) -> Trigger:
    """The perturbation as triggers are applied."""
    parts = candidate.perturbations.formula(candidate.row)
    mask, pattern, added = (part.cpu().numpy().copy() for part in parts)
    name = f"found {candidate.size.kind.NAME} to class {candidate.target}"
    return Trigger(name, candidate.target, mask, pattern, added if added.any() else None)


def _saved(pixels: np.ndarray) -> Float32[np.ndarray, "images channels height width"]:
    """As they are once they were saved with 8 bits."""
    return (np.rint(np.clip(pixels, 0, 1) * 255) / 255).astype(np.float32)
