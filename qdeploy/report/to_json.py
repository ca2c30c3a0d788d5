"""report.json: the whole report for machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from qdeploy.core.metrics import Estimate
from qdeploy.detectors.crowding import CellCrowding
from qdeploy.detectors.differential import Lead
from qdeploy.judging.rates import ArmRates
from qdeploy.judging.verdict import Check
from qdeploy.report.document import (
    SCHEMA_VERSION,
    Written,
    WrittenAgreement,
    WrittenBits,
    WrittenCheck,
    WrittenClass,
    WrittenCrowding,
    WrittenDifferential,
    WrittenEstimate,
    WrittenHardening,
    WrittenLayer,
    WrittenLead,
    WrittenProvenance,
    WrittenRates,
    WrittenReport,
    WrittenTrace,
)
from qdeploy.report.values import Report
from qdeploy.values import LayerPlan, RoundedLayer, named_classes

SHOWN_CONVENTIONS = 3


def to_json(report: Report) -> bytes:
    """The report as UTF-8 JSON. What was not measured (nan) is null."""
    return encoded(written(report))


def encoded(document: Written) -> bytes:
    """In ASCII, so that nothing in a name can play tricks on a terminal."""
    return (json.dumps(table_of(document), indent=2) + "\n").encode()


def table_of(document: Written) -> Any:
    """What JSON can say of it: nan and infinity, as in a policy without a limit, become null."""
    return _finite(document.model_dump(mode="json", by_alias=True))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(report: Report) -> WrittenReport:
    """What is written of a report."""
    rounded = {layer.name: layer for layer in report.layers}
    return WrittenReport(
        schema_version=SCHEMA_VERSION,
        outcome=report.outcome,
        reasons=report.reasons,
        next_steps=report.next_steps,
        not_measured=report.not_measured,
        notes=report.notes,
        output=report.output,
        converted=report.converted,
        run_id=report.run_id,
        started=report.started,
        command=report.command,
        versions=dict(report.versions),
        origin=report.origin,
        cleaning=report.cleaning,
        checks=tuple(_check(check, check.name in report.required) for check in report.checks),
        required=tuple(sorted(report.required)),
        measurements=tuple(_rates(rates, report.classes) for rates in report.rates),
        runtime_agreement=tuple(map(WrittenAgreement.model_validate, report.runtimes)),
        latency=report.latencies,
        files=report.files,
        layers=tuple(_layer(plan, rounded.get(plan.site.name)) for plan in report.plan),
        findings=report.findings,
        provenance=_provenance(report),
        fingerprints=tuple(map(written_crowding, report.crowding[:SHOWN_CONVENTIONS])),
        differential=_differential(report),
        hardening=tuple(map(WrittenHardening.model_validate, report.hardening)),
        bits=None if report.bits is None else WrittenBits.model_validate(asdict(report.bits)),
        left_float=report.left_float,
        data=report.data,
        stages=report.stages,
        recipe=report.recipe,
        policy=report.policy,
        device=report.device,
    )


def _check(check: Check, required: bool) -> WrittenCheck:
    said = {"state": check.state, "within": check.state == "within", "required": required}
    return WrittenCheck(**asdict(check), **said)


def _estimate(estimate: Estimate) -> WrittenEstimate:
    return WrittenEstimate.model_validate(estimate)


def _rates(rates: ArmRates, classes: tuple[str, ...]) -> WrittenRates:
    beside = rates.against_float
    named = zip(classes, rates.class_accuracy, strict=True)
    rises = beside.attack_success_rise if beside is not None else {}
    differences = {
        name: _estimate(getattr(beside, name))
        for name in ("accuracy_drop", "accuracy_drop_relative", "class_drop", "agreement")
        if beside is not None
    }
    return WrittenRates(
        variant=rates.arm.variant,
        runtime=rates.arm.runtime,
        accuracy=_estimate(rates.accuracy),
        top5_accuracy=None if rates.top5_accuracy is None else _estimate(rates.top5_accuracy),
        balanced_accuracy=rates.balanced_accuracy,
        class_accuracy=tuple(WrittenClass(name=name, accuracy=value) for name, value in named),
        attack_success={name: _estimate(rate) for name, rate in rates.attack_success.items()},
        attack_success_rise={name: _estimate(rise) for name, rise in rises.items()},
        **differences,
    )


def _layer(plan: LayerPlan, rounded: RoundedLayer | None) -> WrittenLayer:
    return WrittenLayer(
        name=plan.site.name,
        operators=tuple(use.op_type for use in plan.site.uses),
        shape=plan.site.shape,
        bits=plan.bits,
        max_code=plan.max_code,
        grid=plan.grid,
        storage=plan.storage,
        rounding_planned=plan.rounding,
        **({} if rounded is None else _as_rounded(rounded)),
    )


def _as_rounded(layer: RoundedLayer) -> dict[str, Any]:
    return {
        "rounding_used": layer.rounding_used,
        "degraded": layer.degraded,
        "flipped": layer.flipped,
        "output_error": layer.output_error,
        "nearest_output_error": layer.nearest_error,
        "codes_sha256": layer.sha256,
        "seconds": layer.seconds,
    }


def _provenance(report: Report) -> WrittenProvenance | None:
    """How the file's integers relate to the float weights, layer by layer."""
    found = report.provenance
    if found is None:
        return None
    traces = (
        WrittenTrace(**asdict(layer), explanation=report.explanations[layer.name])
        for layer in found.layers
    )
    return WrittenProvenance(
        not_compared=found.not_compared, differences=found.differences, layers=tuple(traces)
    )


def _differential(report: Report) -> WrittenDifferential | None:
    found = report.differential
    if found is None:
        return None

    def lead(one: Lead) -> WrittenLead:
        name = named_classes((one.target,), report.classes)
        return WrittenLead(name=name, kind=one.kind, size=one.size, led=_estimate(one.led))

    return WrittenDifferential(
        best=lead(found.best),
        null=lead(found.null),
        others=tuple(map(lead, found.others)),
        screened=found.screened,
        classes=found.classes,
        pictures=found.pictures,
        fidelity=found.fidelity,
        seconds=found.seconds,
        arithmetic=found.arithmetic,
    )


def written_crowding(found: CellCrowding) -> WrittenCrowding:
    """What one convention's cells say of the weights."""
    return WrittenCrowding(
        **asdict(found.convention),
        score=found.score,
        ratio=found.whole.ratio,
        layer=found.layer,
        layer_ratio=found.worst.ratio,
    )
