"""What the tests of fleets start from."""

from __future__ import annotations

import os
import platform
from collections import deque
from pathlib import Path

import pytest

from qdeploy.cli import main as command_line
from qdeploy.fleet.cells import Cell, cells_of
from qdeploy.fleet.document import Status
from qdeploy.fleet.drive import Terms, drive
from qdeploy.fleet.manifest import FleetSpec
from qdeploy.fleet.models import Fetched, list_models
from qdeploy.fleet.process import Limits
from qdeploy.fleet.seen import CellOutcome, Seen
from qdeploy.fleet.store import open_store
from qdeploy.fleet.verbs import Asked
from qdeploy.fleet.work import Ended, Task, record_of
from qdeploy.progress import SILENT
from qdeploy.settings.schema import validate
from tests.nets import residual_net

CARD = "[input]\nshape = [3, 8, 8]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
MANIFEST = """
schema_version = 1
name = "two"
key = "fleet.key"
models = [{ path = "models/a.onnx" }, { path = "models/bad.pkl" }]
jobs = [{ verb = "scan" }]
limits = { retries = 1 }
executor = { kind = "local", workers = 2 }
"""
BAD = ', { path = "models/bad.pkl" }'
KEY = bytes(range(32))
HOSTILE = b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch owned\x85R."
LIMITS = Limits(60, None, 1)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with two honest models, a hostile one, and a manifest."""
    models = tmp_path / "models"
    models.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        (models / f"{name}.onnx").write_bytes(residual_net(seed))
        (models / f"{name}.toml").write_text(CARD)
    (models / "bad.pkl").write_bytes(HOSTILE)
    (tmp_path / "fleet.key").write_bytes(KEY)
    (tmp_path / "fleet.key").chmod(0o600)
    (tmp_path / "fleet.toml").write_text(MANIFEST)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_process(monkeypatch):
    """Digests of models are taken here: a process for each test takes seconds."""

    class Here:
        def __init__(self, work) -> None:
            self.do = lambda subject, limits, *, what: work(subject)

        def stop(self) -> None: ...

    monkeypatch.setattr("qdeploy.fleet.facts.Confined", Here)


def fleet(*arguments: str) -> int:
    try:
        command_line(["fleet", "fleet.toml", "--out", "out", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def spec_of(**said) -> FleetSpec:
    table = {"schema_version": 1, "name": "two", "jobs": [{"verb": "scan"}], **said}
    return validate(table, FleetSpec, where="manifest")


def planned(place: Path, **said) -> dict[str, Cell]:
    spec = spec_of(**{"models": [{"path": "models/*.onnx"}], **said})
    models = list_models(spec.models, place, Fetched(place / "fetched", KEY), SILENT)
    return {cell.title: cell for cell in cells_of(spec, place, models, SILENT)}


def status(**said) -> Status:
    told = {"finished": False, "process": os.getpid(), "host": platform.node(), "name": "f"}
    told |= {"cells": 1, "done": 0, "kept": 0, "outcomes": {}, "under_way": (), "per_minute": 0}
    return Status(**{**told, "seconds_left": None, **said})


# Whole fleets


class Scripted:
    """An executor whose cells end as they are told to, in turn."""

    def __init__(self, slots: int = 2, **ends) -> None:
        self.slots = slots
        self.ends = {name: deque(told) for name, told in ends.items()}
        self.started: list[str] = []
        self._under_way: list[Task] = []

    def start(self, task: Task) -> None:
        assert len(self._under_way) < self.slots
        self.started.append(task.cell.asked.label)
        self._under_way.append(task)

    def ended(self, seconds: float) -> list[Ended]:
        return [self._end(self._under_way.pop(0))] if self._under_way else []

    def close(self) -> None:
        self._under_way.clear()

    def _end(self, task: Task) -> Ended:
        told = self.ends.get(task.cell.asked.label.partition(".")[0], deque())
        how = told.popleft() if told else "ACCEPT"
        if how == "elsewhere":
            return Ended(task.cell.id, None, again=True, elsewhere=True)
        outcome = CellOutcome(how.removesuffix(" for good"))
        record = record_of(task.cell, Seen(outcome), task.attempt)
        return Ended(task.cell.id, record, again=how == "FAILED")


class Keeping(Scripted):
    """Whose cells are accepted, and kept."""

    def __init__(self, place: Path, slots: int = 2) -> None:
        super().__init__(slots)
        self._store = open_store(str(place / "store"), place / "fleet.key")
        self._folder = place

    def _end(self, task: Task) -> Ended:
        ended = super()._end(task)
        assert ended.record is not None
        self._store.keep(ended.record, self._folder)
        return ended


def run_with(executor: Scripted, cells: tuple[Cell, ...], retries: int = 2, known=None):
    terms = Terms(LIMITS, retries, "store", None, Path("work"))
    return drive(cells, known or (lambda _: None), executor, terms, lambda _: None)


def cells(count: int) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"id{i}", Asked("scan", Path(f"m{i}.onnx"), f"m{i}.onnx", {}), f"m{i}.onnx, scan")
        for i in range(count)
    )
