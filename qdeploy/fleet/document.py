"""What a fleet writes down: the record of a cell, and fleet.json over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from qdeploy.fleet.seen import CellOutcome
from qdeploy.report.document import Finite, Sha256, Written

SCHEMA_VERSION = 1


class WrittenFile(Written):
    """A file that a cell has left."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$"
    )  # below the cell's folder
    sha256: Sha256
    size_bytes: int


class Record(Written):
    """What came of a cell. Rates in percent, of the device's first runtime; null: not measured."""

    id: str
    title: str
    model: str
    verb: str
    recipe: str | None = None
    policy: str | None = None
    device: str | None = None
    outcome: CellOutcome
    reason: str = ""
    accuracy: Finite = None
    attack_success: Finite = None
    agreement: Finite = None
    size_bytes: int | None = None
    latency_ms: Finite = None
    sha256: Sha256 | None = None  # of the judged file
    findings: Mapping[str, str] = {}
    attempts: int = 1
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    where: str = ""  # machine and processor
    started: str = ""
    command: str = ""
    files: tuple[WrittenFile, ...] = ()


class Status(Written):
    """status.json: where a fleet stands."""

    name: str
    host: str
    process: int
    finished: bool
    cells: int
    done: int
    kept: int
    outcomes: dict[str, int]
    under_way: tuple[str, ...]
    per_minute: float
    seconds_left: float | None


class Change(Written):
    """A cell that is not as it was in an earlier report."""

    title: str
    before: str | None  # null: it was not there
    now: str | None  # null: it is not there any more


class FleetDocument(Written):
    """fleet.json."""

    schema_version: Literal[1]
    name: str
    outcome: str
    version: str
    started: str
    seconds: float
    computed: int  # cells that this run computed; the others were kept
    cells: tuple[Record, ...]
    changes: tuple[Change, ...] | None = None  # null: nothing to compare with
