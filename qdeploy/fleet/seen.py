"""What came of a cell, read from the files that its command left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from qdeploy.disk.files import read_bounded
from qdeploy.errors import EXIT_BAD_INPUT, InputError
from qdeploy.judging.verdict import EXIT_CODE
from qdeploy.report.document import WrittenCheck, WrittenEstimate, WrittenReport, WrittenScans
from qdeploy.report.kept import LARGEST_REPORT_BYTES, parse_object, read_report
from qdeploy.settings.schema import validate

REPORT, TRAINING = "report.json", "training.json"  # that commands leave
DUD_CODE = 3  # of an attack that did not take


class CellOutcome(StrEnum):
    """Of a cell: what the gate says, or why it says nothing."""

    REJECT = "REJECT"
    FAILED = "FAILED"  # killed, timed out, or a bug: nothing is known of the model
    BAD_INPUT = "BAD INPUT"
    NO_VERDICT = "NO VERDICT"
    ACCEPT = "ACCEPT"
    DUD = "DUD"  # an attack that did not take
    DONE = "DONE"  # of commands that judge nothing


VERDICTS = {code: CellOutcome(outcome.value) for outcome, code in EXIT_CODE.items()}


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one command. Rates are in percent of the first runtime."""

    outcome: CellOutcome
    reason: str = ""
    accuracy: float | None = None
    attack_success: float | None = None  # the largest of all known triggers
    agreement: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None  # of one image
    sha256: str | None = None  # of the file that was judged
    read: str | None = None  # digest of the model as the command read it; None: it does not say
    findings: Mapping[str, str] = field(default_factory=dict)  # rule or check, and what it says


def judged(code: int, folder: Path) -> Seen:
    """Of `sanitize` and `gate`.

    Raises:
        InputError: the report is damaged, or says other than the exit code.
    """
    report = read_report(folder / REPORT).content
    outcome = CellOutcome(report.outcome.value)
    if VERDICTS.get(code) is not outcome:
        raise InputError(f"the report says {outcome.value}, the exit code is {code}")
    size = next((f.size_bytes for f in report.files if f.variant == "result"), None)
    seconds = [x.seconds for x in report.latency if x.variant == "result" and x.batch == 1]
    return Seen(
        outcome=outcome,
        reason="; ".join(report.reasons),
        **_rates(report),
        size_bytes=size,
        latency_ms=seconds[0] * 1e3 if seconds else None,
        sha256=report.judged_sha256,
        read=_read(report),
        findings={check.name: _said(check) for check in report.checks if not check.holds}
        | {finding.rule: finding.message for finding in report.findings},
    )


def _read(report: WrittenReport) -> str | None:
    """Of what was judged as it came, else of the float model, unless it was cleaned."""
    if report.recipe is None:
        return report.judged_sha256
    return None if report.cleaning is not None or report.origin is None else report.origin.sha256


def _rates(report: WrittenReport) -> dict[str, float | None]:
    rates = next((one for one in report.measurements if one.variant == "result"), None)
    if rates is None:
        return {}
    return {
        "accuracy": rates.accuracy.value,
        "attack_success": _largest(rates.attack_success.values()),
        "agreement": rates.agreement.value if rates.agreement is not None else None,
    }


def _largest(estimates: Iterable[WrittenEstimate]) -> float | None:
    return max((x.value for x in estimates if x.value is not None), default=None)


def _said(check: WrittenCheck) -> str:
    value = "not measured" if check.value is None else f"{check.value:.4g}"
    return f"{value} {check.unit}, limit {check.relation} {check.limit:g}"


def scanned(code: int, folder: Path) -> Seen:
    """Of `scan`.

    Raises:
        InputError: its report is damaged.
    """
    path = folder / REPORT
    table = parse_object(read_bounded(path, LARGEST_REPORT_BYTES, what="scan"), what=f"scan {path}")
    (one,) = validate(table, WrittenScans, where=f"scan {path}").files
    against = [finding for finding in one.findings if finding.level == "error"]
    found = {finding.rule: finding.message for finding in one.findings}
    if code == EXIT_BAD_INPUT:
        return Seen(
            CellOutcome.BAD_INPUT, one.failed or "", sha256=one.sha256 or None, findings=found
        )
    reason = "; ".join(f"{finding.rule}: {finding.message}" for finding in against)
    sha256 = one.sha256 or None
    return Seen(VERDICTS[code], reason, sha256=sha256, read=sha256, findings=found)


def compared(code: int, folder: Path) -> Seen:  # noqa: ARG001 - it has one
    """Of `compare`, which judges nothing."""
    return Seen(CellOutcome.DONE)


def made(code: int, folder: Path) -> Seen:
    """Of `redteam make`.

    Raises:
        InputError: its log is damaged.
    """
    log: Any = json.loads(read_bounded(folder / TRAINING, 64 << 20, what="training log"))
    if code == DUD_CODE:
        return Seen(CellOutcome.DUD, "; ".join(log["goals_missed"]))
    return Seen(CellOutcome.DONE)
