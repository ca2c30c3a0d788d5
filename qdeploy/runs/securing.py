"""Look for what only the quantized file answers to, and choose its integers again against that."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdeploy.detectors.differential import Differential
from qdeploy.detectors.known import Answer, Detected, NotLookedAt, detect
from qdeploy.disk.state import private_number
from qdeploy.errors import DivergedError, UsageError
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
    """

    def searched(one: Made) -> Secured:
        with clock.stage("detect"):
            subject = suspect(request, made.task.model, one.files["result"], calibration, evidence)
            return Secured(one, detect(subject, clock.progress))

    best = latest = searched(made)
    spec, rounds = request.recipe.hardening, list[HardeningRound]()
    always = spec.when == "always" or request.recipe.rounding.hardened
    answer = best.detected.get(CHECK)
    if always and isinstance(answer, NotLookedAt):
        raise UsageError(
            f"hardening needs a search for triggers, and there is none: {answer.reason}",
            hint='choose --rounding efrap, or [hardening] when = "found" in the recipe',
        )
    for _ in range(0 if spec.when == "never" else spec.rounds):
        found = _found(latest)
        enough = found is None or found.best.led.value <= spec.above
        if found is None or (enough and (rounds or not always)):
            break
        started = time.perf_counter()
        classes = _aimed_at(found, spec.above)
        with clock.stage("harden"):
            again, moved = _hardened(latest.made, classes, request, run, clock)
        latest = searched(again) if again is not None else latest
        after = _value(latest) if again is not None else math.nan
        seconds = time.perf_counter() - started
        rounds.append(HardeningRound(classes, found.best.led.value, after, moved, seconds))
        if again is None:
            break
        if after < _value(best):
            best = latest
    if best is not latest:
        keep(run, {"result": best.made.files["result"]})
    return replace(best, rounds=tuple(rounds))


def _aimed_at(found: Differential, above: float) -> tuple[int, ...]:
    """The class that most images are led to, and others that many are."""
    others = (lead.target for lead in found.others if lead.led.value > above)
    return (found.best.target, *others)


def _value(secured: Secured) -> float:
    found = _found(secured)
    return math.nan if found is None else found.best.led.value


def _found(secured: Secured) -> Differential | None:
    answer = secured.detected.get(CHECK)
    if not isinstance(answer, Detected):
        return None
    found: Differential = answer.evidence
    return found


def _hardened(
    made: Made, classes: tuple[int, ...], request: QuantizeRequest, run: RunDir, clock: Clock
) -> tuple[Made | None, float]:
    """The model with its integers chosen again, and the share that moved; None if it diverged."""
    from qdeploy.quantization.hardening import harden  # torch loads here

    task = made.task
    seed = private_number("hardening", *(layer.sha256 for layer in made.quantized.layers))
    layers = made.quantized.layers
    try:
        found = harden(task, layers, classes, request.recipe.hardening, seed, clock.progress)
    except DivergedError as error:
        clock.progress.note(f"hardening: {error}; the file stays as it was")
        return None, 0.0
    result = emit(task.model, task.plan, task.grids, found.layers)
    files = {**made.files, **keep(run, {"result": result.onnx})}
    return Made(task, result, files), found.moved
