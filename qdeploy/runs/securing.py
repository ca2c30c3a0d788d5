"""Look for what only the quantized file answers to, and choose its integers again against that."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdeploy.data.triggers import Trigger
from qdeploy.detectors.differential import Differential, still_led
from qdeploy.detectors.known import Answer, Detected, NotLookedAt, Suspect, detect
from qdeploy.errors import DivergedError, PlanError, UsageError
from qdeploy.inputs.opened import Calibration, Evidence
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.progress import Clock
from qdeploy.quantization.emit import emit
from qdeploy.quantization.rounding.layers import RoundingTask
from qdeploy.runs.measuring import suspect
from qdeploy.runs.rundir import RunDir
from qdeploy.runs.writing import keep
from qdeploy.values import HardeningRound, QuantizedModel, Variant

CHECK = "differential_trigger"


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A quantized model, what it was made from, and its files as they were read back."""

    task: RoundingTask
    quantized: QuantizedModel
    files: dict[Variant, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Secured:
    """What is delivered, what detectors say of it, and what it took."""

    made: Made
    detected: Mapping[str, Answer]
    rounds: tuple[HardeningRound, ...] = ()


def secure(
    made: Made,
    request: QuantizeRequest,
    calibration: Calibration,
    evidence: Evidence,
    run: RunDir,
    clock: Clock,
) -> Secured:
    """Search; where something is found, choose the integers against it and search anew.

    Of several rounds the one is kept of which a search finds least.

    Raises:
        UsageError: the recipe hardens in any case, and nothing can be searched.
        DivergedError: it hardens in any case, and the loss is no longer finite.
    """
    securing = _Securing(request, calibration, evidence, run, clock)
    best = latest = securing.searched(made)
    spec, rounds = request.recipe.hardening, list[HardeningRound]()
    answer = best.detected.get(CHECK)
    if request.recipe.hardens and isinstance(answer, NotLookedAt):
        raise UsageError(
            f"hardening needs a search for triggers, and there is none: {answer.reason}",
            hint='choose --rounding efrap, or [hardening] when = "found" in the recipe',
        )
    if request.recipe.hardens or (spec.when == "found" and _value(latest) > spec.above):
        known: tuple[Trigger, ...] = ()
        for _ in range(spec.rounds):
            known = (*known, *_triggers(latest))
            latest, done = securing.hardened(latest, known)
            rounds.append(done)
            asked_for = request.recipe.hardens and len(rounds) == 1  # then no other will do
            best = latest if asked_for or _value(latest) < _value(best) else best
            if done.failed is not None or not _value(latest) > spec.above:
                break
    if best is not latest:
        keep(run, {"result": best.made.files["result"]})
    return replace(best, rounds=tuple(rounds))


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """A model whose integers were chosen again."""

    made: Made
    still: float  # percent of images that the best of what was known leads


@dataclass(frozen=True, slots=True)
class _Securing:
    """What searches and hardening of one run have in common."""

    request: QuantizeRequest
    calibration: Calibration
    evidence: Evidence
    run: RunDir
    clock: Clock

    def searched(self, made: Made) -> Secured:
        """What detectors say of the file."""
        with self.clock.stage("detect"):
            subject = self._suspect(made, made.files["result"])
            return Secured(made, detect(subject, self.clock.progress))

    def hardened(
        self, latest: Secured, known: tuple[Trigger, ...]
    ) -> tuple[Secured, HardeningRound]:
        """The file with its integers chosen again and searched anew; as it was if that fails.

        Args:
            known: All perturbations that searches have found so far.
        """
        began, above = time.perf_counter(), self.request.recipe.hardening.above
        found = _found(latest)
        assert found is not None  # noqa: S101 - there is something to harden against
        classes, before = _aimed_at(found, above), found.best.led.value
        against = tuple(trigger for trigger in known if trigger.target in classes)
        moved, still, failed = 0.0, math.nan, None
        try:
            with self.clock.stage("harden"):
                chosen = self._chosen_again(latest.made, classes, against)
            moved, still = _moved(latest.made, chosen.made), chosen.still
            latest = self.searched(chosen.made)
        except (DivergedError, PlanError) as error:
            if self.request.recipe.hardens:
                raise
            failed = str(error)
        seconds = time.perf_counter() - began
        return latest, HardeningRound(
            classes, before, _value(latest), still, moved, seconds, failed
        )

    def _chosen_again(
        self, made: Made, classes: tuple[int, ...], known: tuple[Trigger, ...]
    ) -> _Chosen:
        """The model with its integers chosen again, until what is known leads no more.

        Chance decides how well that goes, so of several attempts the best is kept.
        """
        from qdeploy.quantization.hardening import Against, harden  # torch loads here

        task, layers = made.task, made.quantized.layers
        if task.images is None:
            raise PlanError("there are no calibration images to choose integers by")
        spec, progress = self.request.recipe.hardening, self.clock.progress
        best: tuple[QuantizedModel, float] | None = None
        for _ in range(spec.attempts):
            facts = "".join([*(layer.sha256 for layer in layers), str(task.seed)]).encode()
            seed = int.from_bytes(hashlib.sha256(facts).digest()[:4], "big") >> 1
            found = harden(task, layers, Against(classes, known), spec, seed, progress)
            result = emit(task.model, task.plan, task.grids, found.layers)
            still = still_led(self._suspect(made, result.onnx), known)
            progress.note(f"what was found before leads {still:.1f} % of the images now")
            best = (result, still) if best is None or still < best[1] else best
            layers = result.layers
            if not still > spec.still:
                break
        assert best is not None  # noqa: S101 - there is at least one attempt
        result, still = best
        files = {**made.files, **keep(self.run, {"result": result.onnx})}
        return _Chosen(Made(task, result, files), still)

    def _suspect(self, made: Made, file: bytes) -> Suspect:
        return suspect(self.request, made.task.model, file, self.calibration, self.evidence)


def _aimed_at(found: Differential, above: float) -> tuple[int, ...]:
    """The class that most images are led to, and others that many are."""
    others = (lead.target for lead in found.others if lead.led.value > above)
    return (found.best.target, *others)


def _triggers(secured: Secured) -> tuple[Trigger, ...]:
    """What the search has found, as triggers."""
    found = _found(secured)
    return () if found is None else tuple(lead.trigger for lead in (found.best, *found.others))


def _moved(before: Made, after: Made) -> float:
    """The share of all integers that are others."""
    pairs = list(zip(before.quantized.layers, after.quantized.layers, strict=True))
    moved = sum(int((old.codes != new.codes).sum()) for old, new in pairs)
    return moved / max(sum(old.codes.size for old, _ in pairs), 1)


def _value(secured: Secured) -> float:
    found = _found(secured)
    return math.nan if found is None else found.best.led.value


def _found(secured: Secured) -> Differential | None:
    answer = secured.detected.get(CHECK)
    if not isinstance(answer, Detected):
        return None
    found: Differential = answer.evidence
    return found
