"""One table of layers: how each was rounded, what is seen of that in the file, what bits cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from qdeploy.report.values import Report

EMPTY: Mapping[str, Any] = {
    **dict.fromkeys(
        ["bits", "storage", "rounding", "error", "nearest", "explanation", "steps", "codes"], ""
    ),
    **dict.fromkeys(["scales", "four_bits", "input"], ""),
    "flipped": "0.0",
    "degraded": None,
    "unexplained": False,
}  # of a layer that nothing is known of


def layer_table(report: Report) -> dict[str, Any]:
    """Rows by layer, and which groups of columns there is anything for."""
    return {
        "rows": list(_rows(report)),
        "rounded": bool(report.layers),
        "traced": report.provenance is not None and bool(report.provenance.layers),
        "searched": report.bits is not None,
    }


def _rows(report: Report) -> Iterator[dict[str, Any]]:
    plans = {plan.site.name: plan for plan in report.plan}
    rounded = {layer.name: layer for layer in report.layers}
    traces = report.provenance.layers if report.provenance is not None else ()
    traced = {layer.name: layer for layer in traces}
    costs = {x.layer: x for x in report.bits.layers} if report.bits is not None else {}
    for name in dict.fromkeys([*rounded, *traced]):  # in the order of the graph
        made, seen, cost = rounded.get(name), traced.get(name), costs.get(name)
        row: dict[str, Any] = {**EMPTY, "name": name}
        if made is not None:
            row |= {
                "bits": plans[name].bits,
                "storage": plans[name].storage.value,
                "rounding": made.rounding_used,
                "degraded": made.degraded,
                "flipped": f"{100 * made.flipped:.1f}",
                "error": _percent(made.output_error),
                "nearest": _percent(made.nearest_error),
            }
        if seen is not None:
            explanation = report.explanations[name]
            row |= {
                "bits": seen.bits,
                "storage": seen.storage,
                "explanation": explanation,
                "unexplained": explanation == "unexplained",
                "flipped": f"{100 * seen.flipped:.1f}",
                "steps": f"{seen.steps:.2f}" if math.isfinite(seen.steps) else "-",
                "codes": seen.codes_sha256[:12],
                "scales": seen.scales_sha256[:12],
            }
        if cost is not None:
            row |= {"four_bits": _percent(cost.four_bits), "input": _percent(cost.input)}
        yield row


def _percent(share: float) -> str:
    return f"{100 * share:.3f}" if math.isfinite(share) else "-"
