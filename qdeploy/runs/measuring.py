"""What files do on the runtimes of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from qdeploy.data import Images
from qdeploy.detectors.known import Suspect
from qdeploy.graph.io import identity
from qdeploy.inputs.opened import Answers, Calibration, Evidence
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.sources import CARD
from qdeploy.judging.checks import decided
from qdeploy.judging.measure import Measured, Trial, validate
from qdeploy.progress import Clock
from qdeploy.runs.answered import answers_to, keep_answers
from qdeploy.runs.rundir import RunDir
from qdeploy.runtime.known import runtime_of
from qdeploy.runtime.remembered import KnownAnswers
from qdeploy.settings.checks import ROWS
from qdeploy.settings.device import EMULATED, RuntimeSpec
from qdeploy.values import FloatModel, Interface, Variant

SEARCHED = 1024  # pictures that are opened for detectors, at most


def check_providers(request: Request) -> None:
    """Start every provider that the device profile names, before the work and not after it.

    Raises:
        ProviderError: one is missing or does not work.
    """
    for runtime in request.device.runtimes:
        runtime_of(runtime).open(identity(), runtime)


def form_of(model: FloatModel) -> str:
    """What a file that is made of it takes and gives."""
    shape = ", ".join(map(str, model.input_shape))
    return f"float32 (N, {shape}) to (N, {model.classes})"


def said_before(model: FloatModel | None, request: Request) -> KnownAnswers:
    """What the float model has said in earlier runs."""
    return KnownAnswers() if model is None else answers_to(model.onnx, request.device.runtimes[0])


def answers_of(model: FloatModel | None, request: Request, said: KnownAnswers) -> Answers | None:
    """What stands for labels, if the policy takes it from the float model, and there is one."""
    if model is None or request.policy.validation.labels == "data":
        return None
    first = request.device.runtimes[0]
    return said.of(runtime_of(first).open(model.onnx, first)).logits


def suspect(
    request: Request,
    model: FloatModel | None,
    file: bytes,
    calibration: Calibration | None,
    evidence: Evidence,
) -> Suspect:
    """What detectors are given: among it pictures without labels, of whom the policy trusts.

    Args:
        calibration: None where the file was made elsewhere; then what the command names for it.
    """
    sources, gate = request.sources, request.policy.gate
    given = [(sources.calibration, _calibration(request, calibration)),
             (sources.test, evidence.images)]  # fmt: skip
    pictures = [
        images
        for source, images in given
        if images is not None and source is not None
        and not (gate.independent_evidence and source.given_by == CARD)
    ]  # fmt: skip
    return Suspect(
        model,
        file,
        evidence.images,
        pictures[0] if pictures else None,
        partial(_open, request.device.runtimes[0]),
        partial(_open, RuntimeSpec(provider=EMULATED)) if request.device.saturates else None,
        tuple(sources.card.model.classes or ()) if sources.card is not None else (),
        wanted=frozenset(
            row.name for row in ROWS if gate.limit(row, request.device.budget) is not None
        ),
        off=request.policy.validation.detection == "off",
        seed=request.recipe.seed if isinstance(request, QuantizeRequest) else None,
    )


def _open(spec: RuntimeSpec, data: bytes) -> Answers:
    return runtime_of(spec).open(data, spec).logits


def _calibration(request: Request, calibration: Calibration | None) -> Images | None:
    """The pictures that scales were fitted to, or would be; none that were made up."""
    if calibration is not None:
        return calibration.images if calibration.synthetic is None else None
    given = request.sources.calibration
    off = request.policy.validation.detection == "off"
    if off or given is None or given.given_by == CARD:  # then there are test pictures, or none
        return None
    return request.sources.calibration_images(SEARCHED, request.policy.seed)


@dataclass(frozen=True, slots=True)
class Contestants:
    """The files that are measured beside each other."""

    interface: Interface  # of all of them
    files: Mapping[Variant, bytes]  # as they lie in the run's folder
    said: KnownAnswers  # by the float model so far; more of it afterwards


def measure(
    request: Request, given: Contestants, evidence: Evidence, run: RunDir, clock: Clock
) -> Measured:
    """What the files do on every runtime; an interrupted measurement goes on."""
    runs, store = request.policy.validation.latency_runs, run.predictions
    gate = request.policy.gate
    trial = Trial(
        given.interface, given.files, evidence.images, evidence.triggers, runs, evidence.seen,
        request.sources.stated,
        lambda one, beside: decided(one, beside, evidence, gate),
        given.said,
    )  # fmt: skip
    with clock.stage("validate"):
        found = validate(trial, request.device, store=store, progress=clock.progress)
        if "fp32" in given.files:
            keep_answers(given.said, given.files["fp32"], request.device.runtimes[0])
        return found
