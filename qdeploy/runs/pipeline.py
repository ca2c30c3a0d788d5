"""The order of the stages, written once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy import __version__
from qdeploy.detectors.crowding import scan_weights
from qdeploy.disk.files import require_writable, set_aside, write_atomically
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load, sha256
from qdeploy.formats.static import look, refuse_hostile
from qdeploy.graph.io import identity
from qdeploy.inputs.opened import (
    NO_EVIDENCE,
    Calibration,
    Evidence,
    open_calibration,
    open_evidence,
)
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.sources import Sources
from qdeploy.judging.checks import LayerDigest, LayersAsMade
from qdeploy.judging.measure import Measured, Trial, Variant, validate
from qdeploy.judging.verdict import Outcome
from qdeploy.machine import installed_versions
from qdeploy.progress import Clock, Progress
from qdeploy.provenance.trace import Provenance, trace
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit, wrong_codes
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.report.compose import Findings, compose
from qdeploy.report.render import check_format, render
from qdeploy.report.to_html import to_html
from qdeploy.report.to_json import to_json
from qdeploy.report.values import Report
from qdeploy.runs.rundir import REPORT, RunDir, open_run
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import DeviceProfile
from qdeploy.settings.methods import Nearest
from qdeploy.values import (
    Architecture,
    DataUsed,
    FloatModel,
    Interface,
    Loaded,
    QuantizedModel,
    QuantPlan,
)

WORDS = {Outcome.REJECT: "rejected", Outcome.NO_VERDICT: "unverified"}
PAGE = "report.html"


def sanitize(request: QuantizeRequest, out: Path, progress: Progress) -> Report:
    """Turn the model into a quantized file, measure the file, and judge it.

    The file is put at `out` only if it is accepted; else beside it, under a name that says so.
    """
    clock = Clock(progress)
    check_providers(request)
    check_places(request, out)
    aside = set_aside(out)  # whatever comes now, it is not of this run
    loaded, model = open_model(request, clock)
    before = _before_cleaning(request, clock)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("scan"):
        scan = scan_weights(model, progress)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
        fitted = calibration.prints
        if request.cleaned is not None:
            fitted |= request.cleaned.prints
        evidence = open_evidence(request, model.classes, fitted, progress)
    with open_run(request.artifacts, _run_id(request, model, calibration, evidence)) as run:
        quantized, files = _quantize(request, model, plan, calibration, run, clock)
        if before is not None:
            files = {**keep(run, {"source": before.onnx}), **files}
        measured = measure(request, model.interface, files, evidence, run, clock)
        wrong = wrong_codes(files["result"], plan, quantized.layers)
        provenance = trace(files["result"], model)
        findings = Findings(
            origin=model.origin,
            classes=model.classes,
            evidence=evidence,
            measured=measured,
            scan=scan,
            static=look(run.path / "result.onnx"),
            provenance=provenance,
            known=_chosen(provenance, quantized),
            calibration=calibration,
            plan=plan.layers,
            made=LayersAsMade(quantized.layers, quantized.left_float, wrong),
            cleaning=request.cleaned.cleaning if request.cleaned is not None else None,
        )
        report = compose(request, findings, clock, run.path.name, request.recipe)
        return _deliver(report, request, run, files["result"], out, aside)


def quantize(request: QuantizeRequest, out: Path, progress: Progress) -> QuantizedModel:
    """Quantize by any method, without judging: the stages up to the file."""
    clock = Clock(progress)
    check_places(request, out)
    set_aside(out)
    loaded, model = open_model(request, clock)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
    with open_run(request.artifacts, _run_id(request, model, calibration, NO_EVIDENCE)) as run:
        quantized, files = _quantize(request, model, plan, calibration, run, clock)
        write_atomically(out, files["result"])
        run.seal()
    return quantized


def export_file(request: Request, out: Path, progress: Progress) -> FloatModel:
    """Write the prepared float model."""
    require_writable(out)
    _, model = open_model(request, Clock(progress))
    write_atomically(out, model.onnx)
    return model


def make_plan(request: QuantizeRequest, progress: Progress) -> tuple[FloatModel, QuantPlan]:
    """What `sanitize` would do; nothing is written and no data is read."""
    _, model = open_model(request, Clock(progress))
    return model, plan_layers(model, request.recipe, request.device)


def open_model(request: Request, clock: Clock) -> tuple[Loaded, FloatModel]:
    """The model file as it is, and as a prepared ONNX graph."""
    sources, device = request.sources, request.device
    with clock.stage("load"):
        loaded = open_source(sources, run_code_from_model=request.run_code_from_model)
    with clock.stage("export"):
        return loaded, _exported(loaded, sources, device)


def _before_cleaning(request: QuantizeRequest, clock: Clock) -> FloatModel | None:
    """The float model as it was given, if a sanitizer has worked on it."""
    if request.cleaned is None:
        return None
    sources = request.cleaned.teacher
    with clock.stage("teacher"):
        loaded = open_source(sources, run_code_from_model=request.run_code_from_model)
        return _exported(loaded, sources, request.device)


def _exported(loaded: Loaded, sources: Sources, device: DeviceProfile) -> FloatModel:
    shape, opset = sources.shape, device.opset
    return export(loaded, shape=shape, opset=opset, ir_version=device.ir_version)


def open_source(sources: Sources, *, run_code_from_model: bool) -> Loaded:
    """The model file as it is.

    Raises:
        InputError: it is one to be refused, or was exchanged between looking and loading.
    """
    before = sha256(sources.model)
    refuse_hostile(sources.model, run_code_from_model=run_code_from_model)
    return open_looked_at(sources, before, run_code_from_model=run_code_from_model)


def open_looked_at(sources: Sources, digest: str, *, run_code_from_model: bool) -> Loaded:
    """The same of a file that had this digest when the scan found no error in it."""
    architecture = Architecture(*sources.architecture) if sources.architecture else None
    return load(
        sources.model, architecture, run_code_from_model=run_code_from_model, looked_at=digest
    )


def _quantize(
    request: QuantizeRequest,
    model: FloatModel,
    plan: QuantPlan,
    calibration: Calibration,
    run: RunDir,
    clock: Clock,
) -> tuple[QuantizedModel, dict[Variant, bytes]]:
    """The quantized model, and the files to be measured as they were read back from disk."""
    recipe, images = request.recipe, calibration.images
    with clock.stage("calibrate"):
        grids = calibrate(model, plan, images, recipe.activations, clock.progress)
    with clock.stage("round"):
        task = RoundingTask(model, plan, grids, images, recipe.seed)
        rounded = round_layers(task, recipe.rounding, store=run.layers, progress=clock.progress)
    with clock.stage("emit"):
        result = emit(model, plan, grids, rounded)
        made: dict[Variant, bytes] = {"fp32": model.onnx, "result": result.onnx}
        if not isinstance(recipe.rounding, Nearest):
            nearest = emit(model, plan, grids, round_to_nearest(task))
            made = {"fp32": model.onnx, "nearest": nearest.onnx, "result": result.onnx}
        run.write("recipe.json", as_json(recipe.model_dump(mode="json")))
        run.write("device.json", as_json(request.device.model_dump(mode="json")))
        return result, keep(run, made)


def _deliver(
    report: Report, request: Request, run: RunDir, data: bytes, out: Path, aside: Path | None
) -> Report:
    """Put the file where an accepted one is expected, or beside it under a name that warns.

    The report is written first: there is no file without its evidence.
    """
    if report.outcome is Outcome.ACCEPT:
        place = out
    else:
        place = out.with_name(f"{out.stem}.{WORDS[report.outcome]}{out.suffix}")
        if aside is not None:
            moved = f"{out} of an earlier run is now {aside}"
            report = replace(report, notes=(*report.notes, moved))
    report = replace(report, output=str(place))
    write_reports(report, request, run)
    write_atomically(place, data)
    run.seal()
    return report


def write_reports(report: Report, request: Request, run: RunDir) -> None:
    """The report for people and for machines, in the run's directory and where it was asked for."""
    run.write(REPORT, to_json(report))
    run.write(PAGE, to_html(report))
    for path in request.reports:
        write_atomically(path, render(report, path))


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
    trial = Trial(interface, files, evidence.images, evidence.triggers, runs, evidence.seen)
    with clock.stage("validate"):
        return validate(trial, request.device, store=store, progress=clock.progress)


def keep(run: RunDir, files: Mapping[Variant, bytes]) -> dict[Variant, bytes]:
    """The files as they are read back from the run's directory."""
    for variant, data in files.items():
        run.write(f"{variant}.onnx", data)
    return {variant: run.read(f"{variant}.onnx") for variant in files}


def facts_id(facts: Mapping[str, Any]) -> str:
    """A hash of what changes the result of a run, of the versions of everything too."""
    everything = {"version": __version__, "packages": installed_versions(), **facts}
    return hashlib.sha256(as_json(everything)).hexdigest()[:12]


def _chosen(provenance: Provenance, quantized: QuantizedModel) -> frozenset[LayerDigest]:
    """Those layers of the file whose integers are the ones that were chosen."""
    chosen = {layer.sha256 for layer in quantized.layers}
    traced = provenance.layers
    return frozenset((x.codes_sha256, x.scales_sha256) for x in traced if x.codes_sha256 in chosen)


def _run_id(
    request: QuantizeRequest, model: FloatModel, calibration: Calibration, evidence: Evidence
) -> str:
    """A hash of everything that changes the result."""
    return facts_id(
        {
            "source": model.origin.sha256,
            "model": hashlib.sha256(model.onnx).hexdigest(),
            "input": input_facts(request.sources),
            "recipe": request.recipe.model_dump(mode="json"),
            "policy": request.policy.model_dump(mode="json"),
            "device": request.device.model_dump(mode="json"),
            "data": data_facts((*calibration.used, *evidence.used)),
        }
    )


def input_facts(sources: Sources) -> Any:
    """How pixels become inputs."""
    card = sources.card
    return card.input.model_dump(mode="json") if card is not None else None


def data_facts(used: Sequence[DataUsed]) -> list[Any]:
    return [(data.role, data.name, data.sha256) for data in used]


def check_providers(request: Request) -> None:
    """Start every provider that the device profile names, before the work and not after it.

    Raises:
        ProviderError: one is missing or does not work.
    """
    for runtime in request.device.runtimes:
        open_session(identity(), runtime.provider)


def check_places(request: Request, *places: Path) -> None:
    for path in request.reports:
        check_format(path)
    for place in (*places, *request.reports):
        require_writable(place)


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
