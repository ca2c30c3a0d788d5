"""SARIF 2.1.0: what stands against the file, for code scanning pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from qdeploy import __version__
from qdeploy.disk.printable import printable_tree
from qdeploy.formats.static import RULES
from qdeploy.judging.verdict import describe, missing
from qdeploy.report.taxa import TAXONOMIES, references, taxonomies
from qdeploy.report.values import Report
from qdeploy.settings.checks import ROWS
from qdeploy.values import Finding

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS: Mapping[str, Literal["error", "warning"]] = {"off": "error", "unclear": "warning"}


def to_sarif(report: Report) -> bytes:
    """One run with a result for all that stands against the file, be it measured or seen."""
    uri = sarif_uri(report.output or report.origin.path)
    texts = {row.name: row.says for row in ROWS} | RULES
    properties = {"outcome": report.outcome.value, "runId": report.run_id}
    return sarif(((result, uri) for result in _results(report)), texts, properties)


def sarif(
    results: Iterable[tuple[Finding, str]], rules: Mapping[str, str], properties: Mapping[str, str]
) -> bytes:
    """A document of one run, from findings and the places of their files."""
    driver = {
        "name": "qdeploy",
        "version": __version__,
        "rules": [_rule(name, text) for name, text in rules.items()],
        "supportedTaxonomies": [
            {"name": one.name, "index": place} for place, one in enumerate(TAXONOMIES)
        ],
    }
    run = {
        "tool": {"driver": driver},
        "taxonomies": taxonomies(),
        "results": [_result(finding, uri) for finding, uri in results],
        "properties": properties,
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return (json.dumps(printable_tree(document), indent=2, ensure_ascii=False) + "\n").encode()


def sarif_uri(path: str) -> str:
    """A path as a relative reference, whatever characters a stranger put into it."""
    return quote(Path(path).as_posix().lstrip("/"), errors="surrogateescape")


def _rule(name: str, text: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": name, "shortDescription": {"text": text}}
    targets = references(name)
    if targets:
        rule["relationships"] = [{"target": one, "kinds": ["relevant"]} for one in targets]
    return rule


def _result(finding: Finding, uri: str) -> dict[str, Any]:
    text = f"{finding.where}: {finding.message}" if finding.where else finding.message
    return {
        "ruleId": finding.rule,
        "level": finding.level,
        "message": {"text": text},
        "taxa": references(finding.rule),
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri}}}],
    }


def _results(report: Report) -> Iterator[Finding]:
    for check in report.checks:
        if check.state in LEVELS:
            yield Finding(check.name, LEVELS[check.state], "", f"{describe(check)}.")
    for name in missing(report.checks, report.required):
        text = f"{name} is required, and was not measured on enough images or not at all."
        yield Finding(name, "warning", "", text)
    yield from report.findings
