"""What failures and other fleets do to a cell, and to the other cells."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import pytest

from qdeploy.errors import InputError, OutputError
from qdeploy.fleet import verbs
from qdeploy.fleet.facts import Input
from qdeploy.fleet.forms import place_of
from qdeploy.fleet.process import Spawned
from qdeploy.fleet.seen import CellOutcome, Seen, judged
from qdeploy.fleet.store import Folder, open_store
from qdeploy.fleet.verbs import verb_of
from qdeploy.fleet.whole import read_fleet
from qdeploy.fleet.work import BUSY, FULL, Ended, Task, record_of, work
from tests.fleet_lab import (
    LIMITS,
    Keeping,
    Scripted,
    cells,
    fleet,
    one_process,
    place,
    run_with,
)
from tests.test_attest import report_about


def test_what_lies_where_a_cell_works_and_is_not_ours_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0.onnx").write_bytes(b"model")
    in_place_of_scan(monkeypatch, REPORTED)
    cell = replace(cells(1)[0], digests=(hashlib.sha256(b"model").hexdigest(),))
    left = tmp_path / "out" / "work" / cell.id / "left"
    left.mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (left / "log.txt").symlink_to(tmp_path / "victim")
    (left / "model.onnx").write_bytes(b"evil")
    task = Task(cell, 1, LIMITS, str(tmp_path / "store"), None, tmp_path / "out" / "work")
    ended = work(task, Spawned(()), Event())
    assert [file.name for file in ended.record.files] == ["log.txt", "report.json"]
    assert (tmp_path / "victim").read_text() == "mine"

    store = open_store(task.store, None)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "cells").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cells is a link"):
        store.fetch(ended.record, tmp_path / "out" / place_of(ended.record))
    (tmp_path / "out" / "other").symlink_to(tmp_path / "elsewhere")
    elsewhere = replace(task, cell=replace(cell, id="id9"), work=tmp_path / "out" / "other")
    assert work(elsewhere, Spawned(()), Event()).record.reason.endswith("other: is a link")


def test_a_cell_whose_policy_was_written_to_meanwhile_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0.onnx").write_bytes(b"model")
    policy = tmp_path / "strict.toml"
    policy.write_text("lax")
    in_place_of_scan(monkeypatch, REPORTED)
    known = Input(policy, 3, hashlib.sha256(b"str").hexdigest())
    digest = hashlib.sha256(b"model").hexdigest()
    cell = replace(cells(1)[0], digests=(digest,), inputs=(known,))
    task = Task(cell, 1, LIMITS, str(tmp_path / "store"), None, tmp_path / "out" / "work")
    ended = work(task, Spawned(()), Event())
    assert ended.record.reason == f"{policy} was written to while the fleet ran"
    assert open_store(task.store, None).record(cell.id) is None


@pytest.mark.parametrize(
    ("said", "busy", "full"),
    [
        ("error: run 91ca6ee00cdc is under way in another process (/x)", True, False),
        ("error: cannot write /x/y: No space left on device", False, True),
        ("error: model x is under way in another process (.onnx: damaged", False, False),
        ("error: model No space left on device: damaged", False, False),
    ],
)
def test_a_model_cannot_pretend_by_its_name_that_a_cell_must_wait(said, busy, full):
    assert (BUSY.search(said) is not None, FULL.search(said) is not None) == (busy, full)


# The order of the work


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.drive.pause_before", lambda _: 0.0)
    monkeypatch.setattr("qdeploy.fleet.drive.ELSEWHERE_SECONDS", 0.0)


def test_a_cell_that_was_killed_is_tried_again_and_says_how_often(quick):
    executor = Scripted(m1=["FAILED", "FAILED"], m2=["FAILED"] * 9, m3=["FAILED for good"])
    state = run_with(executor, cells(5))
    told = {r.model: (r.outcome.value, r.attempts) for r in state.records.values()}
    assert told == {
        "m0.onnx": ("ACCEPT", 1), "m1.onnx": ("ACCEPT", 3), "m2.onnx": ("FAILED", 3),
        "m3.onnx": ("FAILED", 1), "m4.onnx": ("ACCEPT", 1),
    }  # fmt: skip
    assert executor.started[:2] == ["m0.onnx", "m1.onnx"]
    assert state.under_way == {}


def test_a_cell_that_another_fleet_is_at_is_waited_for_and_no_attempt(quick):
    executor = Scripted(m0=["elsewhere"] * 5)
    state = run_with(executor, cells(2), retries=0)
    assert {r.attempts for r in state.records.values()} == {1}
    assert executor.started.count("m0.onnx") == 6


def test_what_another_fleet_has_done_meanwhile_is_not_counted_as_computed(tmp_path):
    (cell,) = cells(1)
    task = Task(cell, 1, LIMITS, str(tmp_path / "store"), None, tmp_path / "work")
    done = record_of(cell, Seen(CellOutcome.ACCEPT), 1)
    open_store(task.store, None).keep(done, tmp_path)
    ended = work(task, Spawned(), Event())
    assert (ended.record, ended.elsewhere) == (done, True)
    executor = Scripted()
    executor._end = lambda task: ended  # type: ignore[method-assign]
    state = run_with(executor, (cell,))
    assert (len(state.records), state.computed) == (1, 0)


def test_what_is_done_is_not_begun(quick):
    done = record_of(cells(1)[0], Seen(CellOutcome.REJECT), 1)
    executor = Scripted()
    state = run_with(executor, cells(3), known=lambda c: done if c.id == "id0" else None)
    assert executor.started == ["m1.onnx", "m2.onnx"]
    assert (state.kept, state.computed) == (1, 2)


def test_an_interrupt_ends_what_is_under_way_and_loses_nothing_else(
    place, one_process, monkeypatch, capsys
):
    class Interrupted(Keeping):
        closed = False

        def ended(self, seconds: float) -> list[Ended]:
            if len(self.started) > 1:
                raise KeyboardInterrupt
            return super().ended(seconds)

        def close(self) -> None:
            Interrupted.closed = True

    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Interrupted(place, slots=1))
    assert fleet() == 130
    assert Interrupted.closed
    assert "goes on where it stopped" in capsys.readouterr().err
    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Keeping(place))
    assert fleet() == 0
    assert read_fleet(place / "out" / "fleet.json").computed == 1


def test_a_store_that_cannot_be_written_is_a_failed_attempt(tmp_path, monkeypatch):
    (cell,) = cells(1)
    task = Task(cell, 2, LIMITS, str(tmp_path / "store"), None, tmp_path / "work")

    @contextmanager
    def full(self, name):
        raise OutputError("cannot write store: No space left on device")
        yield

    monkeypatch.setattr(Folder, "claim", full)
    ended = work(task, Spawned(), Event())
    assert ended.again
    assert ended.record.outcome is CellOutcome.FAILED
    assert ended.record.reason.endswith("No space left on device")


def in_place_of_scan(monkeypatch, code: str) -> None:
    """The command of every cell that scans is `code`, which is told the cell's folder."""
    row = replace(verb_of("scan"), command=lambda asked, folder, kept: ["-c", code, str(folder)])
    monkeypatch.setitem(verbs.ROWS, "scan", row)


REPORTED = """
import hashlib, json, os, pathlib, sys
folder, model = pathlib.Path(sys.argv[1]), pathlib.Path("m0.onnx").read_bytes()
file = {"path": "m", "sha256": hashlib.sha256(model).hexdigest(), "findings": [],
        "fingerprints": [], "not_scanned": None, "failed": None}
document = {"schema_version": 1, "version": "0", "files": [file]}
(folder / "report.json").write_text(json.dumps(document))
"""


@pytest.mark.parametrize(
    ("code", "outcome", "reason", "again"),
    [
        (REPORTED, "ACCEPT", "", False),
        (REPORTED + "os.kill(os.getpid(), 9)", "FAILED", "killed by SIGKILL", True),
        (REPORTED + "pathlib.Path('m0.onnx').write_bytes(b'')\nexec(REST)", "FAILED", "", False),
        ("raise SystemExit(130)", "FAILED", "exit code 130: said nothing", True),
        ("raise SystemExit('error: no such card')", "FAILED", "exit code 1: no such card", False),
        ("print('error: no card'); raise SystemExit(2)", "BAD INPUT", "no card", False),
        ("print('error: device x: silent'); raise SystemExit(4)", "NO VERDICT", "device x: silent",
         False),
        ("print('error: cannot write y: No space left on device'); raise SystemExit(2)", "FAILED",
         "exit code 2: cannot write y: No space left on device", True),
    ],
)  # fmt: skip
def test_what_becomes_of_a_cell_however_its_command_ends(
    tmp_path, monkeypatch, code, outcome, reason, again
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0.onnx").write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    if "exec(REST)" in code:  # it is another file when it is read
        code = code.replace("exec(REST)", "") + REPORTED
        reason = "m0.onnx was written to while the fleet ran"
    in_place_of_scan(monkeypatch, code)
    cell = replace(cells(1)[0], digests=(digest,))
    left = tmp_path / "work" / cell.id / "left"
    left.mkdir(parents=True)
    (left / "report.json").write_text("{}")  # of an attempt that was killed
    task = Task(cell, 1, LIMITS, str(tmp_path / "store"), None, tmp_path / "work")
    ended = work(task, Spawned(()), Event())
    assert (ended.record.outcome.value, ended.record.reason) == (outcome, reason)
    assert ended.again is again
    kept = open_store(str(tmp_path / "store"), None).record(cell.id)
    assert (kept is not None) == (outcome == "ACCEPT")
    assert left.exists() == (kept is None)  # what may be gone on with stays


def test_a_finding_tells_of_the_check_that_does_not_hold_and_not_of_its_namesake(tmp_path):
    report = report_about(b"model", "REJECT")
    (off,) = report["checks"]
    report["checks"] = [{**off, "value": 99.5, "state": "within", "runtime": "web"}, off]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert judged(3, tmp_path).findings == {"agreement": "80 %, limit >= 90"}
    with pytest.raises(InputError, match="the report says REJECT, the exit code is 0"):
        judged(0, tmp_path)


# The whole
