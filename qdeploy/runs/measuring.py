"""What files do on the runtimes of a device."""

from __future__ import annotations

from collections.abc import Mapping

from qdeploy.graph.io import identity
from qdeploy.inputs.opened import Answers, Evidence
from qdeploy.inputs.requests import Request
from qdeploy.judging.measure import Measured, Trial, validate
from qdeploy.progress import Clock
from qdeploy.runs.rundir import RunDir
from qdeploy.runtime.known import runtime_of
from qdeploy.values import FloatModel, Interface, Variant


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
