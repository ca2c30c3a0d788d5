"""What files do on the runtimes of a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from qdeploy.data import Images
from qdeploy.detectors.known import Suspect
from qdeploy.graph.io import identity
from qdeploy.inputs.opened import Answers, Calibration, Evidence
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.sources import CARD
from qdeploy.judging.measure import Measured, Trial, validate
from qdeploy.progress import Clock
from qdeploy.runs.rundir import RunDir
from qdeploy.runtime.known import runtime_of
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


def answers_of(model: FloatModel | None, request: Request) -> Answers | None:
    """What stands for labels, if the policy takes it from the float model, and there is one."""
    if model is None or request.policy.validation.labels == "data":
        return None
    first = request.device.runtimes[0]
    return runtime_of(first).open(model.onnx, first).logits


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


def measure(
    request: Request,
    interface: Interface,
    files: Mapping[Variant, bytes],
    evidence: Evidence,
    run: RunDir,
    clock: Clock,
) -> Measured:
    """What the files do on every runtime; an interrupted measurement goes on."""
    runs, store = request.policy.validation.latency_runs, run.predictions
    trial = Trial(
        interface, files, evidence.images, evidence.triggers, runs, evidence.seen,
        request.sources.stated,
    )  # fmt: skip
    with clock.stage("validate"):
        return validate(trial, request.device, store=store, progress=clock.progress)
