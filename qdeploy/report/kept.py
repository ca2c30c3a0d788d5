"""A report.json that was kept, read back: what attestations and trackers build upon."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, first_line
from qdeploy.report.document import WrittenReport
from qdeploy.settings.schema import validate

LARGEST_REPORT_BYTES = 64 << 20


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
