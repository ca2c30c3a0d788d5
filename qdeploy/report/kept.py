"""A report.json that was kept, read back: what attestations and trackers build upon."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, first_line
from qdeploy.settings.schema import Spec, validate

LARGEST_REPORT_BYTES = 64 << 20


class Written(Spec, extra="ignore"):
    """Base of what is read back: keys that nobody here asks for may be added to the report."""


class WrittenOrigin(Written):
    sha256: str
    format: str
    architecture: str | None = None


class WrittenCheck(Written):
    """A check; reports say `state`, or only `within`."""

    name: str
    value: float | None
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    runtime: str | None = None
    subject: str | None = None
    samples: int | None = None
    needed_samples: int = 0
    low: float | None = None
    high: float | None = None
    decided_by: Literal["interval", "value"] = "interval"
    state: str | None = None
    within: bool | None = None

    @property
    def holds(self) -> bool:
        """The value was found to be within its limit."""
        return bool(self.within) if self.state is None else self.state == "within"


class WrittenData(Written):
    role: str
    name: str
    images: int | None
    sha256: str | None


class WrittenFile(Written):
    variant: str
    sha256: str
    size_bytes: int


class WrittenLayer(Written):
    name: str
    rounding_used: str | None = None
    codes_sha256: str | None = None


class WrittenTrace(Written):
    """How the integers of a layer came about."""

    name: str
    explanation: str
    codes_sha256: str
    scales_sha256: str


class WrittenProvenance(Written):
    layers: tuple[WrittenTrace, ...]


class WrittenEstimate(Written):
    value: float | None


class WrittenRates(Written):
    variant: str
    runtime: str
    accuracy: WrittenEstimate
    accuracy_drop: WrittenEstimate | None  # None: there is no float model to compare with
    agreement: WrittenEstimate | None
    attack_success: dict[str, WrittenEstimate]
    attack_success_rise: dict[str, WrittenEstimate]


class WrittenAgreement(Written):
    runtime: str
    agreement: WrittenEstimate


class WrittenLatency(Written):
    variant: str
    batch: int
    seconds: float


class WrittenReport(Written):
    """As much of report.json as is needed elsewhere."""

    schema_version: Literal[1]
    outcome: Literal["ACCEPT", "REJECT", "NO VERDICT"]
    reasons: tuple[str, ...]
    run_id: str
    started: str
    versions: dict[str, str]
    origin: WrittenOrigin | None
    checks: tuple[WrittenCheck, ...]
    required: tuple[str, ...]
    measurements: tuple[WrittenRates, ...]
    runtime_agreement: tuple[WrittenAgreement, ...]
    latency: tuple[WrittenLatency, ...]
    files: tuple[WrittenFile, ...]
    layers: tuple[WrittenLayer, ...]
    data: tuple[WrittenData, ...]
    provenance: WrittenProvenance | None = None
    recipe: dict[str, Any] | None = None
    policy: dict[str, Any] | None = None
    device: dict[str, Any] | None = None

    @property
    def judged_sha256(self) -> str | None:
        """The digest of the file that the outcome is about; None if there is not just one."""
        judged = [f.sha256 for f in self.files if f.variant == "result"]
        return judged[0] if len(judged) == 1 else None


@dataclass(frozen=True, slots=True)
class KeptReport:
    """A report on disk: what it says, and its digest."""

    path: Path
    sha256: str
    content: WrittenReport


def read_report(path: Path) -> KeptReport:
    """The report.json at `path`.

    Raises:
        InputError: it cannot be read, or is not a report.
    """
    data = read_bounded(path, LARGEST_REPORT_BYTES, what="report")
    table = parse_object(data, what=f"report {path}")
    content = validate(table, WrittenReport, where=f"report {path}")
    return KeptReport(path, hashlib.sha256(data).hexdigest(), content)


def parse_object(data: bytes, *, what: str) -> dict[str, Any]:
    """The JSON object in `data`, which no two readers can understand differently.

    Raises:
        InputError: it is not UTF-8 JSON, too deep, not an object, or says a key twice.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise InputError(f"{what}: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{what}: not valid JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key is there twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
