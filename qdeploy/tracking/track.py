"""Logging a run: found again by its id, and never marked as accepted before all of it is there."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qdeploy.disk.files import file_sha256
from qdeploy.errors import InputError, QdeployError, UsageError
from qdeploy.report.kept import KeptReport, read_report
from qdeploy.runs.rundir import REPORT
from qdeploy.tracking.entries import MODEL, OUTCOME, RUN_ID, Entries, entries_of
from qdeploy.tracking.server import Server, connected

RESULT = "result.onnx"
BESIDE = ("report.html", "recipe.json", "policy.json", "device.json")
MODEL_FOLDER = "model"
UNFINISHED = "being logged"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is logged, and what is marked with its verdict."""

    uri: str
    experiment: str
    registered_model: str | None = None
    model_version: int | None = None

    def __post_init__(self) -> None:
        if self.model_version is not None and self.registered_model is None:
            raise UsageError("--model-version needs --registered-model")
        name = self.registered_model
        if name is not None and re.search(r"['\"/:]", name):
            raise UsageError(f"--registered-model {name}: quotes, / and : are not allowed")


@dataclass(frozen=True, slots=True)
class Tracked:
    """An entry of the tracker."""

    run: str
    outcome: str
    updated: bool  # it was there before
    version: str | None  # of the registered model, NAME/N

    def lines(self) -> list[tuple[str, str]]:
        """For people."""
        rows = [
            ("outcome", self.outcome),
            ("updated run" if self.updated else "new run", self.run),
        ]
        return [*rows, ("model version", self.version)] if self.version is not None else rows


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a run left behind."""

    report: KeptReport
    files: tuple[Path, ...]
    model: Path | None  # the judged file, if it lies beside the report


def track(path: Path, place: Place) -> Tracked:
    """Log the run at `path`, a run directory or its report.json; again, if it was before.

    The tag that tells the outcome is set last, so that a run half logged is not taken for an
    accepted one. A version of a registered model is marked only if it holds the judged file.

    Raises:
        InputError: the report is damaged, the file beside it is not the judged one, the server does
            not answer in time or refuses, or the version is not there or holds another file.
        UsageError: MLflow is not installed, or there is no file to register.
    """
    kept = _read(path)
    entries = entries_of(kept.report)
    if place.registered_model and place.model_version is None and kept.model is None:
        raise UsageError(
            f"no judged file lies beside {kept.report.path}: there is nothing to register",
            hint="give the run directory, or the --model-version that holds the file",
        )
    with connected(place.uri) as server:
        experiment = server.experiment(place.experiment)
        if place.registered_model and place.model_version is not None:
            _require_judged(server, place.registered_model, str(place.model_version), entries)
        run_id = entries.tags[RUN_ID]
        found = server.find_run(experiment, RUN_ID, run_id)
        unfinished = {RUN_ID: run_id, OUTCOME: UNFINISHED}
        run = found or server.new_run(experiment, f"qdeploy {run_id}", unfinished)
        _log(server, run, entries, kept)
        version = _mark_version(server, run, place, entries)
    return Tracked(run, entries.tags[OUTCOME], found is not None, version)


def _read(path: Path) -> _Kept:
    report = read_report(path / REPORT if path.is_dir() else path)
    if not re.fullmatch(r"[\w.-]{1,100}", report.content.run_id):
        raise InputError(f"report {report.path}: run_id is not a name")
    folder = report.path.parent
    model = folder / RESULT
    if not model.is_file():
        return _Kept(report, _beside(folder), None)
    sha256 = file_sha256(model, what="model")
    if sha256 != report.content.judged_sha256:
        raise InputError(
            f"model {model}: has sha256 {sha256},"
            f" judged was {report.content.judged_sha256 or 'none'}"
        )
    return _Kept(report, _beside(folder), model)


def _beside(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in BESIDE if (folder / name).is_file())


def _log(server: Server, run: str, entries: Entries, kept: _Kept) -> None:
    new_params = _new_params(server, run, entries)
    server.set_status(run, "RUNNING")
    server.set_tags(run, {OUTCOME: UNFINISHED})
    try:
        server.log_params(run, new_params)
        server.log_metrics(run, entries.metrics, int(time.time() * 1e3))
        for path in (kept.report.path, *kept.files):
            server.log_file(run, path, None)
        if kept.model is not None:
            server.log_file(run, kept.model, MODEL_FOLDER)
        rest = {key: value for key, value in entries.tags.items() if key != OUTCOME}
        server.set_tags(run, rest)
        server.set_tags(run, {OUTCOME: entries.tags[OUTCOME]})
    except QdeployError:
        with suppress(QdeployError):  # the first failure is the one to tell
            server.set_status(run, "FAILED")
        raise
    server.set_status(run, "FINISHED")


def _new_params(server: Server, run: str, entries: Entries) -> dict[str, str]:
    """Those that are not there yet. MLflow never changes a parameter: the others must be equal."""
    there = server.params(run)
    for name, value in entries.params.items():
        if there.get(name, value) != value:
            raise InputError(
                f"MLflow at {server.uri}: run {run} has {name} {there[name]}, the report {value}",
                hint="delete that run, or log to another experiment",
            )
    return {name: value for name, value in entries.params.items() if name not in there}


def _mark_version(server: Server, run: str, place: Place, entries: Entries) -> str | None:
    name = place.registered_model
    if name is None:
        return None
    tags = entries.version_tags()
    if place.model_version is not None:
        version = str(place.model_version)
    else:
        known = server.find_version(name, run, MODEL, tags[MODEL])
        version = known or server.new_version(name, run, MODEL_FOLDER, tags)
    server.tag_version(name, version, tags)
    return f"{name}/{version}"


def _require_judged(server: Server, name: str, version: str, entries: Entries) -> None:
    sha256 = entries.tags.get(MODEL)
    if sha256 is None or not server.version_holds(name, version, sha256):
        raise InputError(
            f"MLflow at {server.uri}: version {version} of {name} holds no file with sha256"
            f" {sha256 or 'none'}, which is the judged one",
            hint="without --model-version, the judged file itself is registered",
        )
