"""The order of the stages, written once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy import __version__
from qdeploy.checks import LayersAsMade
from qdeploy.graph.io import identity, read_single_file
from qdeploy.inputs import (
    NO_PRINTS,
    Calibration,
    Evidence,
    Request,
    open_calibration,
    open_evidence,
)
from qdeploy.methods import Nearest
from qdeploy.model import Architecture, FloatModel, Loaded, QuantizedModel, QuantPlan
from qdeploy.packages import installed_versions
from qdeploy.progress import Clock, Progress
from qdeploy.report.compose import Findings, compose
from qdeploy.report.render import check_format, render
from qdeploy.report.to_html import to_html
from qdeploy.report.to_json import to_json
from qdeploy.report.values import Report
from qdeploy.rundir import REPORT, RunDir, open_run, require_writable, set_aside, write_atomically
from qdeploy.runtime.sessions import open_session
from qdeploy.scan.fingerprints import Scan, scan_weights
from qdeploy.stages.calibrate import calibrate
from qdeploy.stages.emit import emit, wrong_codes
from qdeploy.stages.export import export
from qdeploy.stages.load import load
from qdeploy.stages.plan import plan_layers
from qdeploy.stages.rounding import RoundingTask, round_layers, round_to_nearest
from qdeploy.stages.validate import Trial, Variant, validate
from qdeploy.verdict import Outcome

WORDS = {Outcome.REJECT: "rejected", Outcome.NO_VERDICT: "unverified"}
PAGE = "report.html"
NO_EVIDENCE = Evidence(None, (), ())


def sanitize(request: Request, out: Path, progress: Progress) -> Report:
    """Turn the model into a quantized file, measure the file, and judge it.

    The file is put at `out` only if it is accepted; else beside it, under a name that says so.
    """
    clock = Clock(progress)
    _check_providers(request)
    _check_places(request, out)
    loaded, model = open_model(request, clock)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("scan"):
        scan = scan_weights(model, progress)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
        evidence = open_evidence(request, model.classes, calibration.prints, progress)
    with open_run(request.artifacts, _run_id(request, model, calibration, evidence)) as run:
        quantized, files = _quantize(request, model, plan, calibration, run, clock)
        with clock.stage("validate"):
            runs = request.recipe.validation.latency_runs
            trial = Trial(model, files, evidence.images, evidence.triggers, runs)
            measured = validate(trial, request.device, store=run.predictions, progress=progress)
        wrong = wrong_codes(files["result"], plan, quantized.layers)
        made = LayersAsMade(quantized.layers, quantized.left_float, wrong)
        findings = Findings(model, evidence, measured, scan, calibration, plan.layers, made)
        report = compose(request, findings, clock, run.path.name)
        return _deliver(report, request, run, files["result"], out)


def quantize(request: Request, out: Path, progress: Progress) -> QuantizedModel:
    """Quantize by any method, without judging: the stages up to the file."""
    clock = Clock(progress)
    _check_places(request, out)
    loaded, model = open_model(request, clock)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
    with open_run(request.artifacts, _run_id(request, model, calibration, NO_EVIDENCE)) as run:
        quantized, files = _quantize(request, model, plan, calibration, run, clock)
        write_atomically(out, files["result"])
        run.seal()
    return quantized


def judge_file(request: Request, quantized: Path, progress: Progress) -> Report:
    """Measure and judge a quantized file, whoever made it, against its float model."""
    clock = Clock(progress)
    _check_providers(request)
    _check_places(request)
    with clock.stage("open"):
        result = read_single_file(quantized)
    _, model = open_model(request, clock)
    with clock.stage("scan"):
        scan = scan_weights(model, progress)
    with clock.stage("data"):
        evidence = open_evidence(request, model.classes, NO_PRINTS, progress)
    with clock.stage("validate"):
        files: dict[Variant, bytes] = {"fp32": model.onnx, "result": result}
        runs = request.recipe.validation.latency_runs
        trial = Trial(model, files, evidence.images, evidence.triggers, runs)
        measured = validate(trial, request.device, progress=progress)
    report = compose(request, Findings(model, evidence, measured, scan), clock, "")
    report = replace(report, output=str(quantized))
    for path in request.reports:
        write_atomically(path, render(report, path))
    return report


def export_file(request: Request, out: Path, progress: Progress) -> FloatModel:
    """Write the prepared float model."""
    require_writable(out)
    _, model = open_model(request, Clock(progress))
    write_atomically(out, model.onnx)
    return model


def scan_file(request: Request, progress: Progress) -> tuple[FloatModel, Scan]:
    """What the model's weights tell, without running it."""
    clock = Clock(progress)
    _, model = open_model(request, clock)
    with clock.stage("scan"):
        return model, scan_weights(model, progress)


def make_plan(request: Request, progress: Progress) -> tuple[FloatModel, QuantPlan]:
    """What `sanitize` would do; nothing is written and no data is read."""
    _, model = open_model(request, Clock(progress))
    return model, plan_layers(model, request.recipe, request.device)


def open_model(request: Request, clock: Clock) -> tuple[Loaded, FloatModel]:
    """The model file as it is, and as a prepared ONNX graph."""
    sources, device = request.sources, request.device
    with clock.stage("load"):
        architecture = Architecture(*sources.architecture) if sources.architecture else None
        unsafe = request.run_code_from_model
        loaded = load(sources.model, architecture, run_code_from_model=unsafe)
    with clock.stage("export"):
        opset, ir_version = device.opset, device.ir_version
        return loaded, export(loaded, shape=sources.shape, opset=opset, ir_version=ir_version)


def _quantize(
    request: Request,
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
        for variant, data in made.items():
            run.write(f"{variant}.onnx", data)
        run.write("recipe.json", _json(recipe.model_dump(mode="json")))
        run.write("device.json", _json(request.device.model_dump(mode="json")))
        return result, {variant: run.read(f"{variant}.onnx") for variant in made}


def _deliver(report: Report, request: Request, run: RunDir, data: bytes, out: Path) -> Report:
    """Put the file where an accepted one is expected, or beside it under a name that warns.

    The report is written first: there is no file without its evidence.
    """
    if report.outcome is Outcome.ACCEPT:
        place = out
    else:
        place = out.with_name(f"{out.stem}.{WORDS[report.outcome]}{out.suffix}")
        aside = set_aside(out)
        if aside is not None:
            moved = f"{out} of an earlier run is now {aside}"
            report = replace(report, notes=(*report.notes, moved))
    report = replace(report, output=str(place))
    run.write(REPORT, to_json(report))
    run.write(PAGE, to_html(report))
    for path in request.reports:
        write_atomically(path, render(report, path))
    write_atomically(place, data)
    run.seal()
    return report


def _run_id(
    request: Request, model: FloatModel, calibration: Calibration, evidence: Evidence
) -> str:
    """A hash of everything that changes the result."""
    card = request.sources.card
    facts = {
        "version": __version__,
        "packages": installed_versions(),
        "source": model.origin.sha256,
        "model": hashlib.sha256(model.onnx).hexdigest(),
        "input": card.input.model_dump(mode="json") if card is not None else None,
        "recipe": request.recipe.model_dump(mode="json"),
        "device": request.device.model_dump(mode="json"),
        "data": [
            (data.role, data.name, data.sha256) for data in (*calibration.used, *evidence.used)
        ],
    }
    return hashlib.sha256(_json(facts)).hexdigest()[:12]


def _check_providers(request: Request) -> None:
    """Start every provider that the device profile names, before the work and not after it.

    Raises:
        ProviderError: one is missing or does not work.
    """
    for runtime in request.device.runtimes:
        open_session(identity(), runtime.provider)


def _check_places(request: Request, *places: Path) -> None:
    for path in request.reports:
        check_format(path)
    for place in (*places, *request.reports):
        require_writable(place)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
