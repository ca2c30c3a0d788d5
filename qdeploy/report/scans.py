"""What was seen of model files without running them, for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdeploy import __version__
from qdeploy.detectors.crowding import WeightScan
from qdeploy.disk.files import require_writable
from qdeploy.disk.printable import printable_tree
from qdeploy.errors import QdeployError, UsageError
from qdeploy.formats.static import RULES
from qdeploy.report.document import SCHEMA_VERSION, WrittenScan, WrittenScans
from qdeploy.report.to_json import SHOWN_CONVENTIONS, table_of, written_crowding
from qdeploy.report.to_sarif import sarif, sarif_uri
from qdeploy.values import Finding

HELD_IN_CELLS, UNREADABLE = "held-in-cells", "unreadable"
OF_WEIGHTS = {
    HELD_IN_CELLS: "The float weights were held inside the cells of a quantizer.",
    "graph-differs": "The file is not its float model's graph beyond quantization.",
    "weights-changed": "A weight is further from the float model's than rounding can bring it.",
    "not-nearest": "Integers are not the float weights rounded to nearest.",
    "not-compared": "The file cannot be compared with its float model.",
    UNREADABLE: "The file, or what is needed to look at it, cannot be read.",
}


@dataclass(frozen=True, slots=True)
class FileScan:
    """One file."""

    path: Path
    sha256: str  # empty if the file cannot be read
    findings: tuple[Finding, ...]
    crowding: WeightScan | None  # of the float weights
    not_scanned: str | None  # why there is no scan
    failed: QdeployError | None = None  # what kept the file from being looked at to the end

    @property
    def seen(self) -> tuple[Finding, ...]:
        """The findings, and what the weights tell as one more."""
        found = self.crowding.found if self.crowding is not None else None
        if found is None:
            return self.findings
        text = (
            f"{found.worst.ratio:.1f} times as many weights at the cell edges of"
            f" {found.convention} as there should be: rounding was part of the training"
        )
        return (Finding(HELD_IN_CELLS, "error", found.layer, text), *self.findings)

    @property
    def stands_against(self) -> bool:
        return any(finding.level == "error" for finding in self.seen)


def scans_to_json(scans: Sequence[FileScan]) -> bytes:
    """One object per file, as UTF-8."""
    document = WrittenScans(
        schema_version=SCHEMA_VERSION, version=__version__, files=tuple(map(_written, scans))
    )
    table = printable_tree(table_of(document))
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _written(one: FileScan) -> WrittenScan:
    crowding = one.crowding.crowding[:SHOWN_CONVENTIONS] if one.crowding is not None else ()
    return WrittenScan(
        path=str(one.path),
        sha256=one.sha256,
        findings=one.seen,
        fingerprints=tuple(map(written_crowding, crowding)),
        not_scanned=one.not_scanned,
        failed=str(one.failed) if one.failed is not None else None,
    )


def scans_to_sarif(scans: Sequence[FileScan]) -> bytes:
    """SARIF 2.1.0: every finding a result at its file."""
    return sarif(_results(scans), RULES | OF_WEIGHTS, {})


FORMATS: Mapping[str, Callable[[Sequence[FileScan]], bytes]] = {
    ".json": scans_to_json,
    ".sarif": scans_to_sarif,
}


def check_place(path: Path) -> None:
    """Refuse a place that no scan can be written to, before the work.

    Raises:
        UsageError: no format ends like it.
        OutputError: it cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--report {path}: a scan is written as {' or '.join(FORMATS)}")
    require_writable(path)


def _results(scans: Sequence[FileScan]) -> Iterator[tuple[Finding, str]]:
    for one in scans:
        uri = sarif_uri(str(one.path))
        yield from ((finding, uri) for finding in one.seen)
        if one.failed is not None:
            yield Finding(UNREADABLE, "error", "", str(one.failed)), uri
