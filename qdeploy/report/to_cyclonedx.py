"""CycloneDX 1.6 (ECMA-424): a bill of materials of the judged file, with what was measured."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from qdeploy import __version__
from qdeploy.core.metrics import Estimate
from qdeploy.disk.printable import printable_tree
from qdeploy.judging.rates import ArmRates
from qdeploy.judging.verdict import Check
from qdeploy.report.values import VARIANT_NAMES, Report
from qdeploy.values import DataUsed

SPEC_VERSION = "1.6"
NAMES = uuid.uuid5(uuid.NAMESPACE_URL, "urn:qdeploy:bom")
JUDGED = "judged-file"
Metric = dict[str, Any]


def to_cyclonedx(report: Report) -> bytes:
    """A machine-learning BOM, the same bytes for the same report.

    Its performance metrics are the rates with their 95 % intervals, in percent and percentage
    points; its component is the judged file, whose ancestor is the float model; the data that were
    calibrated and tested on are components of their own. Verdict and checks are properties.
    """
    document = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMES, f'{report.run_id} {_sha256(report)}')}",
        "version": 1,
        "metadata": {
            "timestamp": report.started,
            "tools": {
                "components": [{"type": "application", "name": "qdeploy", "version": __version__}]
            },
            "component": _judged(report),
        },
        "components": [*_converted(report), *(_data(i, one) for i, one in enumerate(report.data))],
    }
    return (json.dumps(printable_tree(document), indent=2, ensure_ascii=False) + "\n").encode()


def _judged(report: Report) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": JUDGED,
        "name": PurePath(report.judged).name or "model",
        "hashes": _hashes(_sha256(report)),
        "modelCard": _card(report),
        "properties": [
            {"name": f"qdeploy:{name}", "value": value} for name, value in _properties(report)
        ],
    }
    if report.origin.path != report.judged:
        ancestor = {
            "type": "machine-learning-model",
            "name": PurePath(report.origin.path).name or "model",
            "hashes": _hashes(report.origin.sha256),
        }
        component["pedigree"] = {"ancestors": [ancestor]}
    return component


def _converted(report: Report) -> Iterator[dict[str, Any]]:
    """The judged file in the format of its device."""
    one = report.converted
    if one is not None:
        yield {
            "type": "machine-learning-model",
            "bom-ref": "converted-file",
            "name": PurePath(one.path).name,
            "description": f"the judged file in {one.format}",
            "hashes": _hashes(one.sha256),
        }


def _sha256(report: Report) -> str:
    """Of the judged file; empty if there is none."""
    return next((one.sha256 for one in report.files if one.variant == "result"), "")


def _hashes(sha256: str | None) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}] if sha256 else []


def _card(report: Report) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "task": "image classification",
        "datasets": [{"ref": _reference(place)} for place in range(len(report.data))],
    }
    if report.origin.architecture:
        parameters["modelArchitecture"] = report.origin.architecture
    limits = [f"not measured: {line}" for line in report.not_measured]
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(report))},
        "considerations": {"technicalLimitations": [*limits, *report.notes]},
    }


def _metrics(report: Report) -> Iterator[Metric]:
    """What was measured; a rate of no images is none."""
    return (
        _metric(kind, estimate, where)
        for kind, estimate, where in _estimates(report)
        if math.isfinite(estimate.value)
    )


def _estimates(report: Report) -> Iterator[tuple[str, Estimate, str]]:
    for rates in report.rates:
        where = f"{VARIANT_NAMES[rates.arm.variant]}, {rates.arm.runtime}"
        for kind, estimate in _measured(rates):
            yield kind, estimate, where
    for other in report.runtimes:
        if other.agreement is not None:
            where = f"{VARIANT_NAMES['result']}, {other.runtime}"
            yield "agreement with the first runtime, %", other.agreement, where
    for latency in report.latencies:
        where = f"{VARIANT_NAMES[latency.variant]}, batch of {latency.batch}"
        low, high = 1000 * latency.low, 1000 * latency.high
        yield "latency, ms", Estimate(1000 * latency.seconds, low, high, latency.runs), where


def _measured(rates: ArmRates) -> Iterator[tuple[str, Estimate]]:
    yield "accuracy, %", rates.accuracy
    for trigger, success in rates.attack_success.items():
        yield f"attack success of {trigger}, %", success
    if rates.against_float is not None:
        yield "agreement with the float model, %", rates.against_float.agreement
        yield "accuracy drop, points", rates.against_float.accuracy_drop


def _metric(kind: str, estimate: Estimate, where: str) -> Metric:
    metric: Metric = {"type": kind, "value": f"{estimate.value:.6g}", "slice": where}
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        low, high = f"{estimate.low:.6g}", f"{estimate.high:.6g}"
        metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
    return metric


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    yield "outcome", report.outcome.value
    yield "policy", str(report.policy.get("name"))
    yield "device", str(report.device.get("name"))
    yield from (("reason", reason) for reason in report.reasons)
    yield from _checks(report.checks)


def _checks(checks: Iterable[Check]) -> Iterator[tuple[str, str]]:
    for check in checks:
        held = f"{check.value:.6g} {check.unit}, limit {check.relation} {check.limit:g}"
        yield f"check:{check.label}", f"{check.state}: {held}"


def _reference(place: int) -> str:
    return f"data-{place}"


def _data(place: int, one: DataUsed) -> dict[str, Any]:
    what = f"{one.role}, {one.images} images" if one.images is not None else one.role
    return {
        "type": "data",
        "bom-ref": _reference(place),
        "name": one.name or one.role,
        "description": f"{what}; given by: {one.given_by}",
        "hashes": _hashes(one.sha256),
        "data": [{"type": "dataset", "name": one.role}],
    }
