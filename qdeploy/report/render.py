"""The report in the format that a file's name asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qdeploy.errors import UsageError
from qdeploy.report.to_cyclonedx import to_cyclonedx
from qdeploy.report.to_html import to_html
from qdeploy.report.to_json import to_json
from qdeploy.report.to_junit import to_junit
from qdeploy.report.to_markdown import to_markdown
from qdeploy.report.to_sarif import to_sarif
from qdeploy.report.values import Report

Writer = Callable[[Report], bytes]
FORMATS: Mapping[str, Writer] = {
    ".cdx.json": to_cyclonedx,  # before .json, which it ends in too
    ".json": to_json,
    ".html": to_html,
    ".xml": to_junit,
    ".sarif": to_sarif,
    ".md": to_markdown,
}


def render(report: Report, path: Path) -> bytes:
    """The report as `path` wants it by its suffix."""
    return _writer(path)(report)


def check_format(path: Path) -> None:
    """Refuse a file name that no format belongs to.

    Raises:
        UsageError: its suffix is unknown.
    """
    _writer(path)


def _writer(path: Path) -> Writer:
    for suffix, writer in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return writer
    raise UsageError(
        f"--report {path}: no format ends in {path.suffix or 'nothing'!r}",
        hint=f"use one of {', '.join(FORMATS)} (.xml is JUnit, .cdx.json CycloneDX)",
    )
