"""report.html: the report for people, one file that opens offline, on a phone and on paper.

Everything in it that comes from the model or the data, names above all, is a stranger's: the
template escapes it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from qdeploy.core.metrics import Estimate
from qdeploy.data import as_png
from qdeploy.detectors.differential import EXACT, Lead, Shown
from qdeploy.judging.rates import ArmRates, Sample
from qdeploy.judging.verdict import Check, Outcome
from qdeploy.report.layer_rows import layer_table
from qdeploy.report.pages import environment
from qdeploy.report.runtime_rows import runtime_text
from qdeploy.report.values import VARIANT_NAMES, Report
from qdeploy.report.words import anchor, words
from qdeploy.values import named_classes

ORDER = ("off", "unclear", "few", "within")
TITLES = {
    "files": "What the files do",
    "checks": "Checks",
    "findings": "Seen without running the file",
    "search": "A search for what only this file answers to",
    "images": "Some images, and what each file says",
    "classes": "Accuracy by class",
    "layers": "Layers",
    "differences": "What differs from the float model",
    "runtimes": "Runtimes",
    "evidence": "Evidence",
    "words": "Words",
}  # in the order of the page, by anchor
MEANINGS = {
    Outcome.ACCEPT: "Every check is within its limit, and every required one was made.",
    Outcome.REJECT: "A check is off its limit: this file must not be deployed.",
    Outcome.NO_VERDICT: "Evidence is missing or unclear: nobody knows if this file is safe.",
}


def to_html(report: Report) -> bytes:
    """The page as UTF-8."""
    template = environment().get_template("report.html.j2")
    shown = set(_sections(report))
    page = template.render(
        outcome=report.outcome.value,
        meaning=MEANINGS[report.outcome],
        judged=report.judged,
        from_what=report.from_what,
        converted=report.converted,
        reasons=report.reasons,
        next_steps=report.next_steps,
        not_measured=report.not_measured,
        notes=report.notes,
        triggers=list(report.rates[0].attack_success) if report.rates else [],
        variants=list(_variants(report)),
        checks=[_check(check, report.required) for check in _worst_first(report.checks)],
        samples=[_sample(sample, report.classes) for sample in report.samples],
        classes=list(_classes(report)),
        differential=_differential(report),
        hardening=list(_hardening(report)),
        layers=layer_table(report),
        searched=_searched(report),
        words=list(words(report)),
        anchor=anchor,
        titles=TITLES,
        sections=[(anchor, title) for anchor, title in TITLES.items() if anchor in shown],
        left_float=report.left_float,
        findings=report.findings,
        not_compared=report.provenance.not_compared if report.provenance is not None else None,
        differences=report.provenance.differences if report.provenance is not None else (),
        runtimes=[{"name": one.runtime, "text": runtime_text(one)} for one in report.runtimes],
        latencies=[
            {
                "name": f"{VARIANT_NAMES.get(entry.variant, entry.variant)}, batch {entry.batch}",
                "text": f"{1e3 * entry.seconds:.2f} ms",
            }
            for entry in report.latencies
        ],
        evidence=list(_evidence(report)),
        command=report.command,
        started=report.started,
        run_id=report.run_id,
        versions=report.versions,
        stages=[{"name": s.name, "seconds": f"{s.seconds:.1f}"} for s in report.stages],
    )
    return page.encode()


def _sections(report: Report) -> Iterator[str]:
    """Anchors of those that there is anything for."""
    yield from ("checks", "evidence", "words")
    provenance = report.provenance
    there = {
        "files": report.rates,
        "classes": report.rates and report.classes,
        "findings": report.findings,
        "search": report.differential,
        "images": report.samples,
        "layers": report.layers or (provenance is not None and provenance.layers),
        "differences": provenance is not None and provenance.differences,
        "runtimes": report.runtimes or report.latencies,
    }
    yield from (anchor for anchor, anything in there.items() if anything)


def _searched(report: Report) -> str:
    """How bits were given to layers, if they were looked for."""
    found = report.bits
    if found is None:
        return ""
    return (
        f"Bits were looked for: {found.average_bits:.2f} a weight on average, with which"
        f" {found.agreement:.1f} % of the calibration images are answered as in float32, for"
        f" {found.wanted:g} %; measured by {found.rounding}."
    )


def _variants(report: Report) -> Iterator[dict[str, Any]]:
    sizes = {file.variant: file.size_bytes for file in report.files}
    for rates in _on_first_runtime(report):
        variant = rates.arm.variant
        measured = [rates.accuracy, *rates.attack_success.values()]
        top5 = rates.top5_accuracy
        yield {
            "kind": variant,
            "name": VARIANT_NAMES[variant],
            "top5": None if top5 is None else _rate(top5),
            "cells": [_cell(estimate) for estimate in measured],
            "agreement": _agreement(rates),
            "megabytes": f"{sizes[variant] / 1e6:.2f}",
        }


def _agreement(rates: ArmRates) -> str:
    beside = rates.against_float
    return "" if beside is None or rates.arm.variant == "fp32" else _rate(beside.agreement)


def _on_first_runtime(report: Report) -> list[ArmRates]:
    return [r for r in report.rates if r.arm.runtime == report.rates[0].arm.runtime]


def _cell(estimate: Estimate) -> dict[str, str]:
    """A number with its bar."""
    return {
        "text": _rate(estimate),
        "value": f"{_finite(estimate.value):.2f}",
        "low": f"{estimate.low:.2f}",
        "width": f"{max(estimate.high - estimate.low, 0.0):.2f}",
    }


def _worst_first(checks: Iterable[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: ORDER.index(check.state))


def _check(check: Check, required: Iterable[str]) -> dict[str, Any]:
    few = f"too few: {check.needed_samples} needed"
    words = {"off": "off its limit", "few": few, "unclear": "unclear", "within": "within"}
    interval = "" if check.low is None else f"{check.low:.2f} to {check.high:.2f}"
    return {
        "name": check.name.replace("_", " "),
        "anchor": anchor(check.name, "check"),
        "required": check.name in set(required),
        "where": check.where,
        "value": f"{check.value:.4g} {check.unit}",
        "interval": interval,
        "limit": f"{'≤' if check.relation == '<=' else '≥'} {check.limit:g}",
        "samples": "" if check.samples is None else f"{check.samples:,}",
        "state": check.state,
        "word": words[check.state],
    }


def _sample(sample: Sample, classes: tuple[str, ...]) -> dict[str, Any]:
    label = classes[sample.label]
    expected = sample.label if sample.trigger is None else sample.target
    return {
        "png": base64.b64encode(as_png(sample.pixels)).decode("ascii"),
        "title": label if sample.trigger is None else f"{label} + trigger",
        "alt": label if sample.trigger is None else f"{label} with {sample.trigger}",
        "answers": [
            {
                "kind": variant,
                "answer": classes[answer] if answer >= 0 else "not finite",
                "state": _state(answer, expected, triggered=sample.trigger is not None),
            }
            for variant, answer in sample.answers.items()
        ],
    }


def _state(answer: int, expected: int | None, *, triggered: bool) -> str:
    """Off: a clean image that is misjudged, or a triggered one that goes to the target."""
    return "off" if (answer == expected) == triggered else ""


def _differential(report: Report) -> dict[str, Any] | None:
    """What a search for triggers has found."""
    found = report.differential
    if found is None:
        return None
    best = found.best
    where = "" if found.arithmetic == EXACT else f", {found.arithmetic}"
    return {
        "summary": (
            f"Perturbations were sought that lead to a class in this file and not in its float"
            f" model: for {found.coverage}, on {found.pictures:,} images. The best leads"
            f" {best.led.value:.1f} % of {best.led.samples} other images to"
            f" {named_classes((best.target,), report.classes)}{where}."
        ),
        "shown": [_perturbed(shown, best.target, report.classes) for shown in found.shown],
        "leads": [
            *(_lead(lead, "this file", "result", report) for lead in (best, *found.others)),
            _lead(found.null, "float model", "fp32", report),
        ],
    }


def _lead(lead: Lead, led: str, kind: str, report: Report) -> dict[str, Any]:
    return {
        "led": led,
        "to": named_classes((lead.target,), report.classes),
        "by": f"{lead.kind}, {lead.size:.3g}",
        "text": _number(lead.led.value, 1),
        "interval": f"{lead.led.low:.1f} to {lead.led.high:.1f}",
        "value": f"{_finite(lead.led.value):.2f}",
        "kind": kind,
    }


def _perturbed(shown: Shown, target: int, classes: tuple[str, ...]) -> dict[str, Any]:
    pairs = (("result", shown.answers), ("fp32", shown.float_answers))
    return {
        "plain": _picture(shown.plain),
        "perturbed": _picture(shown.perturbed),
        "answers": [
            {
                "kind": kind,
                "before": classes[before],
                "after": classes[after],
                "state": "off" if after == target else "",
            }
            for kind, (before, after) in pairs
        ],
    }


def _picture(pixels: Float32[np.ndarray, "channels height width"]) -> str:
    """Pixels in [0, 1] as a PNG in base64."""
    return base64.b64encode(as_png(np.rint(255 * pixels).astype(np.uint8))).decode("ascii")


def _hardening(report: Report) -> Iterator[dict[str, str]]:
    for one in report.hardening:
        yield {
            "classes": named_classes(one.classes, report.classes),
            "before": _number(one.before, 1),
            "after": _number(one.after, 1),
            "still": _number(one.still, 1),
            "moved": f"{100 * one.moved:.2f}",
            "seconds": f"{one.seconds:.0f}",
        }


def _classes(report: Report) -> Iterator[dict[str, Any]]:
    rates = _on_first_runtime(report) if report.rates else []
    for number, name in enumerate(report.classes if rates else ()):
        values = [(r.arm.variant, r.class_accuracy[number]) for r in rates]
        yield {
            "name": name,
            "cells": [
                {"kind": kind, "value": f"{_finite(value):.1f}", "text": _number(value, 1)}
                for kind, value in values
            ],
        }


def _evidence(report: Report) -> Iterator[Mapping[str, str]]:
    yield {"what": "model", "name": report.origin.format, "digest": report.origin.sha256}
    for file in report.files:
        name = f"{file.size_bytes:,} bytes"
        yield {
            "what": f"{VARIANT_NAMES[file.variant]}, as measured",
            "name": name,
            "digest": file.sha256,
        }
    for data in report.data:
        count = "" if data.images is None else f", {data.images:,} images"
        name = f"{data.name}{count} ({data.given_by})"
        yield {"what": data.role, "name": name, "digest": data.sha256 or ""}


def _rate(estimate: Estimate) -> str:
    return _number(estimate.value, 2)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
