"""What a run leaves: files read back from disk, reports, and places found out about beforehand."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit

from qdeploy.disk.files import require_writable, write_atomically
from qdeploy.inputs.requests import Request
from qdeploy.messages.encoded import files_of, from_files
from qdeploy.report.render import check_format, render
from qdeploy.report.to_html import to_html
from qdeploy.report.to_json import to_json
from qdeploy.report.values import Report
from qdeploy.runs.rundir import REPORT, RunDir
from qdeploy.values import Variant

PAGE = "report.html"
FOUND = "found.toml"


def check_places(request: Request, *places: Path) -> None:
    for path in request.reports:
        check_format(path)
    for place in (*places, *request.reports):
        require_writable(place)


def write_reports(report: Report, request: Request, run: RunDir) -> None:
    """The report for people and for machines, in the run's directory and where it was asked for."""
    run.write(REPORT, to_json(report))
    run.write(PAGE, to_html(report))
    write_found(report, run)
    for path in request.reports:
        write_atomically(path, render(report, path))


def write_found(report: Report, run: RunDir) -> None:
    """The perturbation that leads most images, as a trigger file that `--trigger` takes."""
    found = report.differential
    if found is None:
        return
    trigger = found.best.trigger
    if trigger.added is not None:
        arrays = {"values": trigger.added}
        spec: dict[str, Any] = {"kind": "additive"}
    else:
        arrays = {"mask": trigger.mask, "pattern": trigger.pattern}
        spec = {"kind": "mask"}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array, np.float32))
        run.write(f"found-{name}.npy", buffer.getvalue())
        spec[name] = f"found-{name}.npy"
    table = {"trigger": [{**spec, "target": trigger.target, "name": f"found {found.best.kind}"}]}
    run.write(FOUND, tomlkit.dumps(table).encode())


def keep(run: RunDir, files: Mapping[Variant, bytes]) -> dict[Variant, bytes]:
    """The files as they are read back from the run's directory."""
    for variant, data in files.items():
        for name, part in files_of(data, f"{variant}.onnx").items():
            run.write(name, part)
    return {variant: _kept(run, f"{variant}.onnx", data) for variant, data in files.items()}


def _kept(run: RunDir, name: str, data: bytes) -> bytes:
    """A model as it is read back."""
    parts = [run.read(part) for part in files_of(data, name)]
    return parts[0] if len(parts) == 1 else from_files(*reversed(parts))


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
