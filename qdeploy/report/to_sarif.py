"""SARIF 2.1.0: what stands against the file, for code scanning pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdeploy.report.values import Report
from qdeploy.verdict import Check, missing

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = {
    "accuracy_drop": "The quantized file loses more accuracy than allowed.",
    "class_drop": "One class loses more accuracy than allowed.",
    "agreement": "The quantized file disagrees with the float model too often.",
    "attack_success": "A known trigger leads to the attacker's class.",
    "attack_success_rise": "Quantization makes a known trigger work better.",
    "runtime_agreement": "The file answers differently from one runtime to the other.",
    "layers_as_planned": "A layer was left in float or lost its rounding method.",
    "codes_as_chosen": "The file does not hold the integers that were chosen.",
    "cell_crowding": "The float weights were held inside the cells of a quantizer.",
    "file_bytes": "The file is larger than the device allows.",
    "latency_ms": "The file is slower than the device allows.",
}


def to_sarif(report: Report) -> bytes:
    """One run with a result for each check off its limit, and for each required one missing."""
    location = {"physicalLocation": {"artifactLocation": {"uri": _uri(report)}}}
    results = [{**result, "locations": [location]} for result in _results(report)]
    driver = {
        "name": "qdeploy",
        "version": report.versions["qdeploy"],
        "rules": [{"id": name, "shortDescription": {"text": text}} for name, text in RULES.items()],
    }
    run = {
        "tool": {"driver": driver},
        "results": results,
        "properties": {"outcome": report.outcome.value, "runId": report.run_id},
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _results(report: Report) -> Iterator[dict[str, Any]]:
    for check in report.checks:
        if not check.within:
            yield {"ruleId": check.name, "level": "error", "message": {"text": _off(check)}}
    for name in missing(report.checks, report.required):
        text = f"{name} is required, and was not measured on enough images or not at all."
        yield {"ruleId": name, "level": "warning", "message": {"text": text}}


def _off(check: Check) -> str:
    where = ", ".join(part for part in (check.subject, check.runtime) if part)
    value = f"{check.value:.4g} {check.unit} (limit {check.relation} {check.limit:g})"
    return f"{check.name}{f' on {where}' if where else ''}: {value}."


def _uri(report: Report) -> str:
    return Path(report.output or report.origin.path).as_posix().lstrip("/")
