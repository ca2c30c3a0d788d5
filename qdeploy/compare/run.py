"""The whole comparison: every cell of every model, kept as it is measured, then shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy import __version__
from qdeploy.compare.matrix import Cell, Matrix
from qdeploy.compare.plots import draw_plots
from qdeploy.compare.study import Study
from qdeploy.compare.table import as_csv, as_markdown
from qdeploy.disk.files import make_folder, require_writable, write_atomically
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.machine import installed_versions
from qdeploy.progress import Progress

CELLS = "cells"
TABLE, CSV = "table.md", "cells.csv"
FLOAT = "float32"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it."""

    records: tuple[dict[str, Any], ...]  # of each cell, and of each float model
    table: str  # Markdown
    written: tuple[Path, ...]


def compare(
    requests: Sequence[QuantizeRequest],
    matrix: Matrix,
    out: Path,
    steps: int | None,
    progress: Progress,
) -> Comparison:
    """Measure every cell that `out` does not have yet, and write table, CSV and plots.

    Args:
        requests: One for each model; their recipes say what the cells do not.
        steps: Optimizer steps of the methods that train; None for as published.

    Raises:
        UsageError: a model has no test images.
        InputError: a model, a card or an image is not valid.
        OutputError: `out` cannot be written to.
    """
    make_folder(out)
    require_writable(out / TABLE)
    records: list[dict[str, Any]] = []
    for number, request in enumerate(requests, 1):
        name = _name(request, requests)
        progress.note(f"{number}/{len(requests)} {name}")
        records.extend(_records(request, name, matrix, out / CELLS, steps, progress))
    table = as_markdown(records)
    files = {TABLE: table.encode(), CSV: as_csv(records).encode(), **draw_plots(records)}
    for file, data in files.items():
        write_atomically(out / file, data)
    return Comparison(tuple(records), table, tuple(out / file for file in files))


def _records(
    request: QuantizeRequest,
    name: str,
    matrix: Matrix,
    store: Path,
    steps: int | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    study = Study.open(request, matrix.seeds, progress)
    found = study.float_rates()
    success = [estimate.value for estimate in found.attack_success.values()]
    yield {
        "model": name,
        "method": FLOAT,
        "accuracy": found.accuracy.value,
        "success": max(success, default=None),
    }
    cells = list(matrix.cells())
    for number, cell in enumerate(cells, 1):
        path = store / f"{_digest(study, cell, steps)}.json"
        measured = _load(path)
        if measured is None:
            with progress.stage(f"{number}/{len(cells)} {_about(cell)}"):
                measured = study.measure(cell, steps)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(measured, indent=1).encode())
        yield {"model": name, **asdict(cell), **measured}


def _digest(study: Study, cell: Cell, steps: int | None) -> str:
    """A hash of everything that changes what is measured."""
    facts = {
        "version": __version__,
        "packages": installed_versions(),
        "model": hashlib.sha256(study.model.onnx).hexdigest(),
        "recipe": cell.recipe(study.request.recipe, steps).model_dump(mode="json"),
        "device": study.request.device.model_dump(mode="json"),
        "evidence": [(data.role, data.sha256) for data in study.evidence.used],
        "calibration": study.digests[cell.seed],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _load(path: Path) -> dict[str, Any] | None:
    """A cell as it was kept; None if it was not, or is damaged."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return kept


def _name(request: QuantizeRequest, requests: Sequence[QuantizeRequest]) -> str:
    """The file's name; with its folder's where several models are called the same."""
    path = request.sources.model
    alike = [other for other in requests if other.sources.model.stem == path.stem]
    return path.stem if len(alike) == 1 else f"{path.parent.name}/{path.stem}"


def _about(cell: Cell) -> str:
    activations = "weights only" if cell.activations == "none" else "activations 8"
    return f"{cell.method} {cell.bits} bits {cell.grid}, {activations}, seed {cell.seed}"
