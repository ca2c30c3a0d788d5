"""Judge an ONNX file, whoever made it, by a policy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.detectors.known import detect
from qdeploy.formats.onnx.reading import is_quantized, read_single_file
from qdeploy.formats.opening import refuse_exchanged, sha256
from qdeploy.formats.static import findings_in
from qdeploy.graph.ends import as_classifier_bytes
from qdeploy.inputs.opened import NO_EVIDENCE, Evidence, open_evidence
from qdeploy.inputs.requests import Request
from qdeploy.judging.checks import LayerDigest, Results, stands_against
from qdeploy.judging.measure import Measured
from qdeploy.progress import Clock, Progress
from qdeploy.provenance.trace import Provenance, trace
from qdeploy.report.compose import compose
from qdeploy.report.values import Report
from qdeploy.runs.answered import note_on
from qdeploy.runs.made import recall
from qdeploy.runs.measuring import (
    Contestants,
    answers_of,
    check_providers,
    measure,
    said_before,
    suspect,
)
from qdeploy.runs.opening import open_model
from qdeploy.runs.run_id import data_facts, facts_digest, input_facts, run_id
from qdeploy.runs.rundir import RunDir, open_run
from qdeploy.runs.writing import as_json, check_places, keep, write_reports
from qdeploy.runtime.known import runtime_of
from qdeploy.values import Finding, FloatModel, Interface, Origin, Variant

OWN = "a run of this user has written the file, and explains its integers"


@dataclass(frozen=True, slots=True)
class Subject:
    """The file to be judged, and what is known of where it came from."""

    path: Path
    has_reference: bool  # the request's model is its float model, and not the file itself
    known: AbstractSet[LayerDigest] = frozenset()  # layers as a run of this program rounded them


def gate(request: Request, subject: Subject, progress: Progress) -> Report:
    """Measure the file as it lies on disk, and judge it.

    A file that breaks a rule of the static scan is not run: the report then speaks of nothing else.

    Raises:
        InputError: the file cannot be read, is no classifier, or not that of the reference.
        UsageError: it takes other images than the card says.
        ProviderError: a runtime of the device is missing, or cannot run the file.
    """
    clock = Clock(progress)
    check_providers(request)
    check_places(request)
    origin = Origin(str(subject.path), sha256(subject.path), "ONNX")
    own = recall(origin.sha256)
    subject = replace(subject, known=subject.known | own)
    with clock.stage("scan"):
        static = findings_in(subject.path)
    if any(stands_against(f, request.policy.gate) for f in static):
        return _refuse(request, subject, origin, static, clock)
    allow = request.policy.gate.waived("finding")
    data = read_single_file(subject.path, allow=allow)
    refuse_exchanged(subject.path, origin.sha256, hashlib.sha256(data).hexdigest())
    waived = any(finding.level == "error" for finding in static)
    model = _float_model(request, subject, data, clock, waived=waived)
    run = as_classifier_bytes(data, request.sources.stated, where=str(subject.path))
    interface = _interface(run, subject, request) if model is None else model.interface
    provenance = None
    if model is not None and subject.has_reference:
        with clock.stage("compare"):
            origin, provenance = model.origin, trace(run, model)
    with clock.stage("data"):
        float_model = model if subject.has_reference else None
        said = said_before(float_model, request)
        reference = answers_of(float_model, request, said)
        evidence = open_evidence(request, interface.classes, (), progress, reference)
    with clock.stage("detect"):
        suspected = suspect(request, model, run, None, evidence)
        if not subject.has_reference:
            suspected = replace(suspected, file=None)
        detected = detect(suspected, progress)
    digest = _digest(request, subject, data, model, evidence)
    with open_run(request.artifacts, run_id(digest), digest) as folder:
        files = keep(folder, _variants(data, model, provenance))
        measured = measure(request, Contestants(interface, files, said), evidence, folder, clock)
        found = Results(
            origin=origin,
            classes=interface.classes,
            evidence=evidence,
            measured=measured,
            static=static,
            detected=detected,
            provenance=provenance,
            known=subject.known,
            notes=(*((OWN,) if own else ()), *note_on(said)),
        )
        return _deliver(compose(request, found, clock, folder.path.name), request, subject, folder)


def _refuse(
    request: Request, subject: Subject, origin: Origin, static: tuple[Finding, ...], clock: Clock
) -> Report:
    """The report on a file that nobody should run."""
    facts = {"file": origin.sha256, "policy": request.policy.model_dump(mode="json")}
    digest = facts_digest(facts)
    with open_run(request.artifacts, run_id(digest), digest) as run:
        found = Results(
            origin=origin,
            classes=0,
            evidence=NO_EVIDENCE,
            measured=Measured(()),
            static=static,
        )
        return _deliver(compose(request, found, clock, run.path.name), request, subject, run)


def _float_model(
    request: Request, subject: Subject, data: bytes, clock: Clock, *, waived: bool
) -> FloatModel | None:
    """The reference; without one the file itself, if its weights are float.

    A file that breaks a rule by somebody's leave is for the runtime alone: no loader opens it.
    """
    if not subject.has_reference and (waived or is_quantized(data)):
        return None
    _, model = open_model(request, clock)
    return model


def _interface(data: bytes, subject: Subject, request: Request) -> Interface:
    first = request.device.runtimes[0]
    return runtime_of(first).open(data, first).interface(where=f"model {subject.path}")


def _variants(
    data: bytes, model: FloatModel | None, provenance: Provenance | None
) -> Mapping[Variant, bytes]:
    """The file, its float model, and what rounding to nearest would have made of it."""
    files: dict[Variant, bytes] = {}
    if model is not None and provenance is not None:
        files["fp32"] = model.onnx
        if provenance.nearest is not None:
            files["nearest"] = provenance.nearest
    return files | {"result": data}


def _digest(
    request: Request, subject: Subject, data: bytes, model: FloatModel | None, evidence: Evidence
) -> str:
    return facts_digest(
        {
            "file": hashlib.sha256(data).hexdigest(),
            "reference": hashlib.sha256(model.onnx).hexdigest() if model is not None else None,
            "known": sorted(subject.known),
            "input": input_facts(request.sources),
            "policy": request.policy.model_dump(mode="json"),
            "device": request.device.model_dump(mode="json"),
            "data": data_facts(evidence.used),
        }
    )


def _deliver(report: Report, request: Request, subject: Subject, run: RunDir) -> Report:
    report = replace(report, output=str(subject.path))
    run.write("policy.json", as_json(request.policy.model_dump(mode="json")))
    run.write("device.json", as_json(request.device.model_dump(mode="json")))
    write_reports(report, request, run)
    run.seal()
    return report
