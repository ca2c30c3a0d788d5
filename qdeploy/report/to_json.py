"""report.json: the whole report for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from qdeploy.detectors.crowding import CellCrowding
from qdeploy.judging.rates import ArmRates
from qdeploy.report.values import Report
from qdeploy.values import Cleaning, LayerPlan, RoundedLayer

SCHEMA_VERSION = 1
SHOWN_CONVENTIONS = 3


def to_json(report: Report) -> bytes:
    """The report as UTF-8 JSON. What was not measured (nan) is null."""
    rounded = {layer.name: layer for layer in report.layers}
    document = {
        "schema_version": SCHEMA_VERSION,
        "outcome": report.outcome.value,
        "reasons": report.reasons,
        "not_measured": report.not_measured,
        "notes": report.notes,
        "output": report.output,
        "run_id": report.run_id,
        "started": report.started,
        "command": report.command,
        "versions": report.versions,
        "origin": fields(report.origin),
        "cleaning": _cleaning(report.cleaning),
        "checks": [
            {**fields(c), "state": c.state, "within": c.state == "within",
             "required": c.name in report.required}
            for c in report.checks
        ],
        "required": sorted(report.required),
        "measurements": [_rates(r, report.classes) for r in report.rates],
        "runtime_agreement": [
            {"runtime": r.runtime, "agreement": fields(r.agreement)} for r in report.runtimes
        ],
        "latency": [fields(latency) for latency in report.latencies],
        "files": [fields(f) for f in report.files],
        "layers": [_layer(plan, rounded.get(plan.site.name)) for plan in report.plan],
        "findings": [fields(f) for f in report.findings],
        "provenance": _provenance(report),
        "fingerprints": [crowding_fields(f) for f in report.crowding[:SHOWN_CONVENTIONS]],
        "left_float": [fields(layer) for layer in report.left_float],
        "data": [fields(d) for d in report.data],
        "stages": [fields(s) for s in report.stages],
        "recipe": report.recipe,
        "policy": report.policy,
        "device": report.device,
    }  # fmt: skip
    return (json.dumps(_plain(document), indent=2) + "\n").encode()


def _cleaning(cleaning: Cleaning | None) -> dict[str, Any] | None:
    if cleaning is None:
        return None
    parts = {"origin": fields(cleaning.origin), "images": fields(cleaning.images)}
    return {**fields(cleaning), **parts}


def _rates(rates: ArmRates, classes: tuple[str, ...]) -> dict[str, Any]:
    named = zip(classes, rates.class_accuracy, strict=True)
    beside = rates.against_float
    differences = {
        name: fields(getattr(beside, name)) if beside is not None else None
        for name in ("accuracy_drop", "accuracy_drop_relative", "class_drop", "agreement")
    }
    rises = beside.attack_success_rise if beside is not None else {}
    return {
        "variant": rates.arm.variant,
        "runtime": rates.arm.runtime,
        "accuracy": fields(rates.accuracy),
        "class_accuracy": [{"class": name, "accuracy": value} for name, value in named],
        **differences,
        "attack_success": {name: fields(e) for name, e in rates.attack_success.items()},
        "attack_success_rise": {name: fields(e) for name, e in rises.items()},
    }


def _layer(plan: LayerPlan, rounded: RoundedLayer | None) -> dict[str, Any]:
    planned = {
        "name": plan.site.name,
        "operators": [use.op_type for use in plan.site.uses],
        "shape": plan.site.shape,
        "bits": plan.bits,
        "max_code": plan.max_code,
        "grid": plan.grid.model_dump(mode="json"),
        "storage": plan.storage.value,
        "rounding_planned": plan.rounding,
    }
    if rounded is None:
        return planned
    return planned | {
        "rounding_used": rounded.rounding_used,
        "degraded": rounded.degraded,
        "flipped": rounded.flipped,
        "output_error": rounded.output_error,
        "nearest_output_error": rounded.nearest_error,
        "codes_sha256": rounded.sha256,
        "seconds": rounded.seconds,
    }


def _provenance(report: Report) -> dict[str, Any] | None:
    """How the file's integers relate to the float weights, layer by layer."""
    found = report.provenance
    if found is None:
        return None
    return {
        "not_compared": found.not_compared,
        "differences": [fields(d) for d in found.differences],
        "layers": [
            {**fields(layer), "explanation": report.explanations[layer.name]}
            for layer in found.layers
        ],
    }


def crowding_fields(found: CellCrowding) -> dict[str, Any]:
    """What one convention's cells say of the weights."""
    return {
        **fields(found.convention),
        "score": found.score,
        "ratio": found.whole.ratio,
        "layer": found.layer,
        "layer_ratio": found.worst.ratio,
    }


def fields(value: Any) -> dict[str, Any]:
    """A frozen value as a mapping."""
    return {name: getattr(value, name) for name in value.__slots__}


def _plain(value: Any) -> Any:
    """What JSON can say: nan becomes null, enums their values, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset | set):
        items = sorted(value) if isinstance(value, frozenset | set) else value
        return [_plain(item) for item in items]
    return value
