"""Look for what only the quantized file answers to, and choose its integers again against that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdeploy.detectors.differential import Differential
from qdeploy.detectors.known import Answer, Detected, detect
from qdeploy.disk.state import private_number
from qdeploy.errors import DivergedError
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
    """

    def searched(one: Made) -> Secured:
        with clock.stage("detect"):
            subject = suspect(request, made.task.model, one.files["result"], calibration, evidence)
            return Secured(one, detect(subject, clock.progress))

    best = latest = searched(made)
    spec, rounds = request.recipe.hardening, list[HardeningRound]()
    always = spec.when == "always" or request.recipe.rounding.hardened
    for _ in range(0 if spec.when == "never" else spec.rounds):
        found = _found(latest)
        if found is None or (found.best.led.value <= spec.above and not (always and not rounds)):
            break
        started = time.perf_counter()
        classes = tuple(
            lead.target
            for lead in (found.best, *found.others)
            if lead is found.best or lead.led.value > spec.above
        )
        with clock.stage("harden"):
            hardened = _hardened(latest.made, classes, request, run, clock)
        if hardened is None:
            break
        again, moved = hardened
        latest = searched(again)
        after = _found(latest)
        value = after.best.led.value if after is not None else float("nan")
        rounds.append(
            HardeningRound(
                classes, found.best.led.value, value, moved, time.perf_counter() - started
            )
        )
        least = _found(best)
        if after is not None and least is not None and value < least.best.led.value:
            best = latest
    return replace(best, rounds=tuple(rounds))


def _found(secured: Secured) -> Differential | None:
    answer = secured.detected.get(CHECK)
    if not isinstance(answer, Detected):
        return None
    found: Differential = answer.evidence
    return found


def _hardened(
    made: Made, classes: tuple[int, ...], request: QuantizeRequest, run: RunDir, clock: Clock
) -> tuple[Made, float] | None:
    """The model with its integers chosen again; None if that did not come to an end."""
    from qdeploy.quantization.hardening import harden  # torch loads here

    task = made.task
    seed = private_number("hardening", *(layer.sha256 for layer in made.quantized.layers))
    layers = made.quantized.layers
    try:
        found = harden(task, layers, classes, request.recipe.hardening, seed, clock.progress)
    except DivergedError as error:
        clock.progress.note(f"hardening: {error}; the file stays as it was")
        return None
    result = emit(task.model, task.plan, task.grids, found.layers)
    files = {**made.files, **keep(run, {"result": result.onnx})}
    return Made(task, result, files), found.moved
