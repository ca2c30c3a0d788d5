"""The report over a fleet in every form: JSON, a page, JUnit, SARIF, CSV."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from xml.etree import ElementTree as ET

from markupsafe import Markup

from qdeploy.disk.printable import printable, printable_tree
from qdeploy.errors import UsageError
from qdeploy.fleet.document import FleetDocument, Record
from qdeploy.fleet.seen import CellOutcome
from qdeploy.formats.static import RULES
from qdeploy.judging.verdict import Outcome
from qdeploy.report.pages import environment
from qdeploy.report.scans import OF_WEIGHTS
from qdeploy.report.to_sarif import sarif, sarif_uri
from qdeploy.settings.checks import ROWS
from qdeploy.values import Finding

MEANINGS = {
    Outcome.ACCEPT: "Every one was accepted, or did what it was to do.",
    Outcome.REJECT: "At least one must not be deployed.",
    Outcome.NO_VERDICT: "None was rejected, but of at least one nothing is known.",
}
COLUMNS = (
    ("model", ""), ("verdict", ""), ("command", "wide"), ("recipe", "wide"), ("device", ""),
    ("CDA %", "n"), ("ASR %", "n"), ("agrees %", "n wide"), ("MB", "n wide"),
    ("ms", "n wide"), ("took s", "n wide"), ("tries", "n wide"), ("why", ""),
)  # fmt: skip
CSV_COLUMNS = (
    "title", "model", "verb", "recipe", "policy", "device", "outcome", "reason", "accuracy",
    "attack_success", "agreement", "size_bytes", "latency_ms", "sha256", "attempts", "seconds",
    "cpu_seconds", "peak_bytes", "where", "id",
)  # fmt: skip
PAGES = ("report.html", "report.json", "comparison/table.md", "training.json")  # of a cell
MOST_ROWS = 5000  # of the page: browsers take their time for more
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for one


def place_of(record: Record) -> str:
    """Where the files of a cell lie, below the folder of the fleet's report."""
    readable = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in record.title
    )
    return f"cells/{readable[:80]}-{record.id[:16]}"


def to_json(document: FleetDocument) -> bytes:
    table = printable_tree(document.model_dump(mode="json"))
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()


def to_html(document: FleetDocument) -> bytes:
    """One table of all cells, which can be searched, filtered and sorted; opens offline."""
    script = (files("qdeploy.report") / "fleet.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        environment()
        .get_template("fleet.html.j2")
        .render(
            name=document.name,
            outcome=document.outcome,
            meaning=MEANINGS[Outcome(document.outcome)],
            started=document.started,
            seconds=f"{document.seconds:.0f}",
            computed=document.computed,
            version=document.version,
            cells=[_row(record) for record in _worst_first(document)[:MOST_ROWS]],
            total=len(document.cells),
            counts=counts(document),
            filters=list(_filters(document)),
            columns=COLUMNS,
            changes=document.changes,
            script=Markup(script),  # noqa: S704 - ours
            script_hash=f"sha256-{digest}",
        )
    )
    return page.encode()


def _worst_first(document: FleetDocument) -> list[Record]:
    order = list(CellOutcome)
    return sorted(document.cells, key=lambda record: order.index(record.outcome))


def counts(document: FleetDocument) -> list[tuple[str, int]]:
    """How many cells came to what, the worst first."""
    counted = Counter(record.outcome for record in document.cells)
    return [(outcome.value, counted[outcome]) for outcome in CellOutcome if counted[outcome]]


def _filters(document: FleetDocument) -> Iterator[tuple[str, str, list[tuple[str, int]]]]:
    """Columns that a reader chooses by: id, label, and values with how often they are there."""
    for name, label, values in (
        ("verdict", "verdict", [record.outcome.value for record in document.cells]),
        ("device", "device", [_short(record.device) for record in document.cells]),
        ("verb", "command", [record.verb for record in document.cells]),
    ):
        counted = Counter(filter(None, values))
        if len(counted) > 1:
            yield name, label, sorted(counted.items())


def _row(record: Record) -> dict[str, Any]:
    names = {file.name for file in record.files}
    page = next((name for name in PAGES if name in names), None)
    return {
        "model": record.model,
        "outcome": record.outcome.value,
        "verb": record.verb,
        "recipe": ", ".join(filter(None, (_short(record.recipe), _short(record.policy)))),
        "device": _short(record.device),
        "accuracy": _number(record.accuracy, 1),
        "attack": _number(record.attack_success, 1),
        "agreement": _number(record.agreement, 1),
        "size": _number(record.size_bytes and record.size_bytes / 1e6, 2),
        "bytes": record.size_bytes or "",
        "latency": _number(record.latency_ms, 2),
        "seconds": _number(record.seconds, 1),
        "attempts": record.attempts,
        "reason": record.reason,
        "page": quote(f"{place_of(record)}/{page}") if page is not None else None,
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(name: str | None) -> str:
    return Path(name).stem if name else ""


def to_junit(document: FleetDocument) -> bytes:
    """A test case for each cell: what is rejected fails, of what nothing is known is an error."""
    records = document.cells
    failures = sum(record.outcome is CellOutcome.REJECT for record in records)
    errors = sum(record.outcome in _UNKNOWN for record in records)
    suite = ET.Element(
        "testsuite", name=f"qdeploy fleet {document.name}", tests=str(len(records)),
        failures=str(failures), errors=str(errors), timestamp=document.started,
        time=f"{document.seconds:.3f}",
    )  # fmt: skip
    for record in records:
        case = ET.SubElement(
            suite, "testcase", classname="qdeploy.fleet", name=printable(record.title),
            time=f"{record.seconds:.3f}",
        )  # fmt: skip
        said = printable(f"{record.outcome.value}: {record.reason}")
        if record.outcome is CellOutcome.REJECT:
            ET.SubElement(case, "failure", message=said)
        elif record.outcome in _UNKNOWN:
            ET.SubElement(case, "error", message=said)
    return ET.tostring(suite, encoding="utf-8", xml_declaration=True)


_UNKNOWN = frozenset({CellOutcome.FAILED, CellOutcome.BAD_INPUT, CellOutcome.NO_VERDICT})


def to_sarif(document: FleetDocument) -> bytes:
    """What stands against the models, each result at its model; all cells in one run."""
    texts = {row.name: row.says for row in ROWS} | RULES | OF_WEIGHTS | {NOT_KNOWN: NOT_KNOWN_SAYS}
    properties = {"outcome": document.outcome, "fleet": document.name}
    return sarif(_results(document), texts, properties)


NOT_KNOWN = "not-known"
NOT_KNOWN_SAYS = "The command did not come to a verdict."


def _results(document: FleetDocument) -> Iterator[tuple[Finding, str]]:
    for record in document.cells:
        uri = sarif_uri(record.model)
        level: Literal["error", "warning"] = (
            "error" if record.outcome is CellOutcome.REJECT else "warning"
        )
        for rule, text in record.findings.items():
            yield Finding(rule, level, record.title, text), uri
        if record.outcome in (CellOutcome.FAILED, CellOutcome.BAD_INPUT):
            yield Finding(NOT_KNOWN, "warning", record.title, record.reason), uri


def to_csv(document: FleetDocument) -> bytes:
    """A line for each cell; texts that a spreadsheet would compute begin with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in document.cells:
        table = record.model_dump(mode="json")
        writer.writerow([_plain(table[column]) for column in CSV_COLUMNS])
    return text.getvalue().encode()


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return "" if value is None else value
    shown = printable(value)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


FORMATS: Mapping[str, Callable[[FleetDocument], bytes]] = {
    ".json": to_json, ".html": to_html, ".xml": to_junit, ".sarif": to_sarif, ".csv": to_csv,
}  # fmt: skip


def render(document: FleetDocument, path: Path) -> bytes:
    """The report as the path's ending asks.

    Raises:
        UsageError: no form ends so.
    """
    return FORMATS[form_of(path)](document)


def form_of(path: Path) -> str:
    """The ending of a form.

    Raises:
        UsageError: no form ends so.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--report {path}: a fleet is written as {', '.join(FORMATS)}")
    return path.suffix.lower()
