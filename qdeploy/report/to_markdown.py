"""The report in a screenful of Markdown, for job summaries and pull requests."""

from __future__ import annotations

from collections.abc import Iterable

from qdeploy.core.metrics import Estimate
from qdeploy.disk.printable import printable
from qdeploy.judging.verdict import Outcome
from qdeploy.report.values import VARIANT_NAMES, Report

MARKS = {Outcome.ACCEPT: "✅", Outcome.REJECT: "❌", Outcome.NO_VERDICT: "⚠️"}
SHOWN_FINDINGS = 10


def to_markdown(report: Report) -> bytes:
    """Verdict, reasons and rates."""
    lines = [f"## {MARKS[report.outcome]} {report.outcome.value}: {_plain(report.judged)}", ""]
    if report.from_what:
        lines += [_plain(report.from_what), ""]
    lines += [f"- {_plain(reason)}" for reason in report.reasons]
    lines += [f"- next: {_plain(step)}" for step in report.next_steps]
    lines += [f"- not measured: {_plain(line)}" for line in report.not_measured]
    if report.rates:
        triggers = list(report.rates[0].attack_success)
        lines += ["", _row(["", "CDA %", *(f"ASR %, {_plain(t)}" for t in triggers), "agree %"])]
        lines.append(_row(["---", *["---:"] * (len(triggers) + 2)]))
        for rates in report.rates:
            values = [rates.accuracy, *rates.attack_success.values()]
            beside = rates.against_float
            name = f"{VARIANT_NAMES[rates.arm.variant]}, {rates.arm.runtime}"
            agreement = "" if beside is None else _figure(beside.agreement)
            lines.append(_row([name, *map(_figure, values), agreement]))
    seen = [f"{f.level}, {f.rule}: {f.message}" for f in report.findings if f.level != "note"]
    lines += [f"- {_plain(text)}" for text in seen[:SHOWN_FINDINGS]]
    lines += [""] + [f"{_plain(note)}\n" for note in report.notes]
    return ("\n".join(lines).rstrip() + "\n").encode()


def _figure(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _row(fields: Iterable[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _plain(text: str) -> str:
    """Without what Markdown or a terminal would obey: names come from strangers."""
    shown = printable(text)
    for mark in "\\`*_[]<>|":
        shown = shown.replace(mark, f"\\{mark}" if mark not in "<>" else f"&#{ord(mark)};")
    return shown
