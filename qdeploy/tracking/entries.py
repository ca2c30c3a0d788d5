"""What a report says, in the words of an experiment tracker: parameters, metrics, tags. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qdeploy.report.document import WrittenEstimate, WrittenRates, WrittenReport
from qdeploy.report.kept import KeptReport

LONGEST_NAME = 250
LONGEST_PARAM = 500
LONGEST_TAG = 5000
OUTCOME = "qdeploy.outcome"
RUN_ID = "qdeploy.run_id"
MODEL = "qdeploy.model_sha256"
REPORT = "qdeploy.report_sha256"
REASONS = "qdeploy.reasons"


@dataclass(frozen=True, slots=True)
class Entries:
    """A run as a tracker keeps it."""

    params: Mapping[str, str]  # the same whenever the run is logged again
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    def version_tags(self) -> dict[str, str]:
        """What a version of a registered model is marked with."""
        return {key: self.tags[key] for key in (RUN_ID, MODEL, OUTCOME) if key in self.tags}


def entries_of(kept: KeptReport) -> Entries:
    """The report as entries; what was not measured is left out."""
    report = kept.content
    tags = {
        OUTCOME: report.outcome.value,
        RUN_ID: report.run_id,
        MODEL: report.judged_sha256,
        REPORT: kept.sha256,
        REASONS: "\n".join(report.reasons)[:LONGEST_TAG],
    }
    return Entries(
        params={key: value[:LONGEST_PARAM] for key, value in _params(report) if value},
        metrics=_named((name, value) for name, value in _metrics(report) if value is not None),
        tags={key: value for key, value in tags.items() if value is not None},
    )


def metric_name(*parts: str) -> str:
    """The parts with slashes between them, in characters that every tracker takes.

    A part keeps letters, digits, `_`, `-` and `.`; whatever else is in a row becomes one `_`.
    """
    plain = (re.sub(r"[^A-Za-z0-9_.-]+", "_", part).strip("._") or "_" for part in parts)
    return "/".join(plain)[:LONGEST_NAME].rstrip("./")


def _params(report: WrittenReport) -> Iterator[tuple[str, str]]:
    recipe, origin = report.recipe or {}, report.origin
    yield from (
        ("recipe", _text(recipe, "name")),
        ("policy", _text(report.policy or {}, "name")),
        ("device", _text(report.device or {}, "name")),
        ("bits", _text(recipe, "bits")),
        ("seed", _text(recipe, "seed")),
    )
    yield "rounding", ", ".join(sorted({x.rounding_used for x in report.layers if x.rounding_used}))
    if origin is not None:
        yield "source_format", origin.format
        yield "source_sha256", origin.sha256
    yield from ((metric_name("version", name), text) for name, text in report.versions.items())


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    return "" if value is None else str(value)


def _metrics(report: WrittenReport) -> Iterator[tuple[str, float | None]]:
    for rates in report.measurements:
        for name, estimate in _rates(rates):
            value = estimate.value if estimate is not None else None
            yield f"{metric_name(rates.variant, rates.runtime)}/{name}", value
    for other in report.runtime_agreement:
        if other.agreement is not None:
            yield metric_name("runtime_agreement", other.runtime), other.agreement.value
    for latency in report.latency:
        name = metric_name(latency.variant, f"batch_{latency.batch}", "latency_ms")
        yield name, 1e3 * latency.seconds
    for file in report.files:
        yield metric_name(file.variant, "size_bytes"), float(file.size_bytes)


def _rates(rates: WrittenRates) -> Iterator[tuple[str, WrittenEstimate | None]]:
    yield from (
        ("accuracy", rates.accuracy),
        ("accuracy_drop", rates.accuracy_drop),
        ("agreement", rates.agreement),
    )
    for trigger, estimate in rates.attack_success.items():
        yield metric_name("attack_success", trigger), estimate
    for trigger, estimate in rates.attack_success_rise.items():
        yield metric_name("attack_success_rise", trigger), estimate


def _named(metrics: Iterator[tuple[str, float]]) -> dict[str, float]:
    """By name; where two have become the same, the later ones are numbered."""
    table: dict[str, float] = {}
    for name, value in metrics:
        unique, count = name[:LONGEST_NAME], 1
        while unique in table:
            count += 1
            unique = f"{name[: LONGEST_NAME - 6]}_{count}"
        table[unique] = value
    return table
