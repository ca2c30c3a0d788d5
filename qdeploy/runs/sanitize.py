"""From a float model to a judged file: the order of the work, written once, the cleaning included.

scan -> load -> [clean] -> export -> plan -> calibrate -> round -> emit -> detect -> [harden]
-> measure -> judge
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.disk.files import require_writable, set_aside, write_atomically
from qdeploy.formats.static import findings_in
from qdeploy.inputs.opened import (
    NO_EVIDENCE,
    Calibration,
    Evidence,
    Fitted,
    open_calibration,
    open_evidence,
)
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.judging.checks import LayerDigest, LayersAsMade, Results
from qdeploy.judging.verdict import Outcome
from qdeploy.machine import require_torch
from qdeploy.messages.encoded import files_of
from qdeploy.progress import Clock, Progress
from qdeploy.provenance.trace import Provenance, trace
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit, wrong_codes
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.report.compose import compose
from qdeploy.report.values import Report
from qdeploy.runs.answered import note_on
from qdeploy.runs.converting import beside, places_beside
from qdeploy.runs.deciding import decide
from qdeploy.runs.made import remember
from qdeploy.runs.measuring import (
    Contestants,
    answers_of,
    check_providers,
    form_of,
    measure,
    said_before,
)
from qdeploy.runs.opening import exported, open_model, open_source
from qdeploy.runs.run_id import data_facts, facts_digest, input_facts, run_id
from qdeploy.runs.rundir import RunDir, open_run
from qdeploy.runs.securing import Made, secure
from qdeploy.runs.writing import as_json, check_places, keep, write_reports
from qdeploy.settings.device import misfit
from qdeploy.values import FloatModel, QuantizedModel, QuantPlan, Variant

if TYPE_CHECKING:
    from qdeploy.runs.clean import Student

WORDS = {Outcome.REJECT: "rejected", Outcome.NO_VERDICT: "unverified"}


def sanitize(request: QuantizeRequest, out: Path, progress: Progress) -> Report:
    """Turn the model into a quantized file, measure the file, and judge it.

    The file is put at `out` only if it is accepted; else beside it, under a name that says so.
    """
    clock = Clock(progress)
    check_providers(request)
    check_places(request, out)
    aside = _set_aside(out)
    uncleaned, student = request.sources, _cleaned(request, progress)
    if student is not None:
        request = replace(request, sources=replace(uncleaned, model=student.path))
    loaded, model = open_model(request, clock)
    before = None
    if student is not None:
        with clock.stage("teacher"):
            given = open_source(uncleaned, run_code_from_model=request.run_code_from_model)
            before = exported(given, uncleaned, request.device)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
        fitted = [calibration.fitted, *_fitted_to(student)]
        said = said_before(model, request)
        reference = answers_of(model, request, said)
        evidence = open_evidence(request, model.classes, fitted, progress, reference)
    decided = decide(request, model, plan, calibration, clock)
    request, plan = decided.request, decided.plan
    digest = _digest(request, model, calibration, evidence)
    with open_run(request.artifacts, run_id(digest), digest) as run:
        made = _quantize(request, model, plan, calibration, run, clock)
        for name, table in decided.tables.items():
            run.write(name, table)
        secured = secure(made, request, calibration, evidence, run, clock)
        quantized, files, detected = secured.made.quantized, secured.made.files, secured.detected
        if before is not None:
            files = {**keep(run, {"source": before.onnx}), **files}
        measured = measure(request, Contestants(model.interface, files, said), evidence, run, clock)
        wrong = wrong_codes(files["result"], plan, quantized.layers)
        provenance = trace(files["result"], model)
        known = _chosen(provenance, quantized)
        remember(hashlib.sha256(files["result"]).hexdigest(), known)
        results = Results(
            origin=model.origin,
            classes=model.classes,
            evidence=evidence,
            measured=measured,
            static=findings_in(run.path / "result.onnx"),
            detected=detected,
            provenance=provenance,
            known=known,
            notes=(
                *_ends_note(model),
                *decided.notes,
                *calibration.notes,
                *note_on(said),
            ),
            calibration=calibration,
            plan=plan.layers,
            made=LayersAsMade(quantized.layers, quantized.left_float, wrong),
            cleaning=student.cleaning() if student is not None else None,
            hardening=secured.rounds,
            bits=decided.bits,
        )
        report = compose(request, results, clock, run.path.name, request.recipe)
        return _deliver(report, request, run, files["result"], out, aside)


def quantize(request: QuantizeRequest, out: Path, progress: Progress) -> QuantizedModel:
    """Quantize by any method, without judging: the stages up to the file."""
    clock = Clock(progress)
    check_places(request, out)
    _set_aside(out)
    loaded, model = open_model(request, clock)
    plan = plan_layers(model, request.recipe, request.device)
    with clock.stage("data"):
        calibration = open_calibration(request, loaded, plan, progress)
        for note in calibration.notes:
            progress.note(note)
    decided = decide(request, model, plan, calibration, clock)
    request, plan = decided.request, decided.plan
    digest = _digest(request, model, calibration, NO_EVIDENCE)
    with open_run(request.artifacts, run_id(digest), digest) as run:
        made = _quantize(request, model, plan, calibration, run, clock)
        for name, table in decided.tables.items():
            run.write(name, table)
        if request.recipe.hardens:
            made = secure(made, request, calibration, NO_EVIDENCE, run, clock).made
        for place, data in beside(made.files["result"], out, request.device).files.items():
            write_atomically(place, data)
        write_atomically(out, made.files["result"])
        run.seal()
    return replace(made.quantized, misfit=misfit(request.device))


def export_file(request: Request, out: Path, progress: Progress) -> FloatModel:
    """Write the prepared float model."""
    require_writable(out)
    _, model = open_model(request, Clock(progress), images=False)
    for name, part in files_of(model.onnx, out.name).items():
        write_atomically(out.with_name(name), part)
    return model


def make_plan(request: QuantizeRequest, progress: Progress) -> tuple[FloatModel, QuantPlan]:
    """What `sanitize` would do; nothing is written and no data is read."""
    _, model = open_model(request, Clock(progress), images=False)
    return model, plan_layers(model, request.recipe, request.device)


def _set_aside(out: Path) -> Path | None:
    """Move away what is there, in whatever format: it is not of this run."""
    for place in places_beside(out):
        set_aside(place)
    return set_aside(out)


def _cleaned(request: QuantizeRequest, progress: Progress) -> Student | None:
    """The cleaned float model, if it is to be cleaned first."""
    if request.cleaning is None:
        return None
    require_torch("cleaning a model")
    from qdeploy.runs.clean import clean_alone

    return clean_alone(request.cleaning, progress)


def _fitted_to(student: Student | None) -> Iterator[Fitted]:
    """The images that a student was taught on."""
    if student is not None:
        yield Fitted(student.hashes, f"images {student.images.name} that it was cleaned with")


def _quantize(
    request: QuantizeRequest,
    model: FloatModel,
    plan: QuantPlan,
    calibration: Calibration,
    run: RunDir,
    clock: Clock,
) -> Made:
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
        if recipe.rounding.name != "nearest":
            nearest = emit(model, plan, grids, round_to_nearest(task))
            made = {"fp32": model.onnx, "nearest": nearest.onnx, "result": result.onnx}
        run.write("recipe.json", as_json(recipe.model_dump(mode="json")))
        run.write("device.json", as_json(request.device.model_dump(mode="json")))
        return Made(task, result, keep(run, made))


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
    others = beside(data, place, request.device)
    report = replace(report, output=str(place), converted=others.converted)
    write_reports(report, request, run)
    for path, content in {**others.files, place: data}.items():
        write_atomically(path, content)
    run.seal()
    return report


def _ends_note(model: FloatModel) -> tuple[str, ...]:
    """That whoever feeds the file must feed it otherwise than the one that came."""
    if not model.other_ends:
        return ()
    return (f"the file takes and gives {form_of(model)}, other than the model that came",)


def _chosen(provenance: Provenance, quantized: QuantizedModel) -> frozenset[LayerDigest]:
    """Those layers of the file whose integers are the ones that were chosen."""
    chosen = {layer.sha256 for layer in quantized.layers}
    traced = provenance.layers
    return frozenset((x.codes_sha256, x.scales_sha256) for x in traced if x.codes_sha256 in chosen)


def _digest(
    request: QuantizeRequest, model: FloatModel, calibration: Calibration, evidence: Evidence
) -> str:
    """A hash of everything that changes the result."""
    return facts_digest(
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
