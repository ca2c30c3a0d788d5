"""Fleets: what a manifest comes to, what is kept, and what failures do to the other cells."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from xml.etree import ElementTree as ET

import pytest
import typer

from qdeploy.cli import app
from qdeploy.cli import main as command_line
from qdeploy.disk.state import KEY_VARIABLE, private_number
from qdeploy.errors import InputError, OutputError, QdeployError, UsageError
from qdeploy.fleet import verbs
from qdeploy.fleet.cells import Cell, cells_of
from qdeploy.fleet.document import FleetDocument, Record, Status, WrittenFile
from qdeploy.fleet.drive import Terms, drive
from qdeploy.fleet.emit import Job, to_k8s, to_slurm
from qdeploy.fleet.facts import Input
from qdeploy.fleet.forks import Forks
from qdeploy.fleet.forms import place_of, render, to_csv, to_html
from qdeploy.fleet.manifest import FleetSpec
from qdeploy.fleet.models import Fetched, list_models
from qdeploy.fleet.options import SETTINGS, arguments, checked
from qdeploy.fleet.process import Limits, Spawned, watch
from qdeploy.fleet.run import read_status
from qdeploy.fleet.seen import CellOutcome, Seen, judged
from qdeploy.fleet.store import Folder, Store, open_store
from qdeploy.fleet.verbs import Asked, members, verb_of
from qdeploy.fleet.whole import changes, read_fleet, whole
from qdeploy.fleet.work import BUSY, FULL, Ended, Task, record_of, work
from qdeploy.judging.verdict import Outcome
from qdeploy.progress import SILENT
from qdeploy.settings.schema import validate
from tests.nets import residual_net
from tests.test_attest import report_about

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


def test_every_cell_is_computed_once_and_one_report_tells_of_all(place, capsys):
    assert fleet("--report", "r.csv", "--report", "r.xml", "--report", "r.sarif") == 3
    document = read_fleet(place / "out" / "fleet.json")
    seen = {record.title: record.outcome.value for record in document.cells}
    assert seen == {"a.onnx, scan": "ACCEPT", "bad.pkl, scan": "REJECT"}
    assert (document.outcome, document.computed) == ("REJECT", 2)
    assert not (place / "owned").exists()
    for record in document.cells:
        files = {file.name for file in record.files}
        assert {"report.json", "report.sarif", "log.txt"} == files
        assert all((place / "out" / place_of(record) / name).is_file() for name in files)
    rows = list(csv.DictReader(io.StringIO((place / "r.csv").read_text())))
    assert [row["outcome"] for row in rows] == ["ACCEPT", "REJECT"]
    suite = ET.fromstring((place / "r.xml").read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    results = json.loads((place / "r.sarif").read_text())["runs"][0]["results"]
    assert {result["ruleId"] for result in results} >= {"pickle-import"}
    assert [path.name for path in (place / "out" / "work").iterdir()] == ["claims"]

    # again: nothing is to be done, but what somebody has changed in the store
    (first,) = (one for one in document.cells if one.model == "a.onnx")
    file = next(file for file in first.files if file.name == "report.json")
    kept, out = place / "store" / "files" / file.sha256, place / "out" / place_of(first)
    (out / file.name).unlink()
    assert fleet() == 3
    assert read_fleet(place / "out" / "fleet.json").computed == 0
    kept.write_bytes(kept.read_bytes().replace(b"1", b"2"))
    (out / file.name).unlink()
    (place / "models" / "bad.pkl").unlink()
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, ""))
    assert fleet("--since", "out/fleet.json") == 0
    again = read_fleet(place / "out" / "fleet.json")
    assert again.computed == 1
    assert [(one.title, one.now) for one in again.changes] == [("bad.pkl, scan", None)]
    capsys.readouterr()
    assert fleet("--watch") == 0
    assert "1/1 cells" in capsys.readouterr().out


def test_a_share_leaves_its_cells_in_the_store_for_the_whole(
    place, capsys, monkeypatch, one_process
):
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, "").replace("/a.", "/*."))
    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Keeping(place))
    assert fleet("--share", "1/2") == 0
    assert not (place / "out" / "fleet.json").exists()
    assert read_status(place / "out" / "status-1-of-2.json").done == 1
    assert fleet("--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 cells: 1 are done, 0 are refused; the others take a worker" in said
    assert fleet("--share", "0/2") == 0
    assert fleet() == 0
    assert read_fleet(place / "out" / "fleet.json").computed == 0
    assert fleet("--share", "2/2") == 2


# Manifests


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"jobs": []}, "jobs"),
        ({"modls": []}, "is models meant?"),
        ({"models": [{"path": "a", "uri": "models:/a"}]}, "either path or uri"),
        ({"models": [{"uri": "runs:/a", "tracking_uri": "x"}]}, "must begin with models:/"),
        ({"models": [{"uri": "models:/a"}]}, "uri and tracking_uri belong together"),
        ({"jobs": [{"verb": "scan", "suite": "detection"}]}, "a suite is what redteam needs"),
        ({"limits": {"minutes": 0}}, "greater than 0"),
        ({"executor": {"kind": "threads"}}, "executor"),
        ({"name": "Two Words"}, "name"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_line(said, complaint):
    with pytest.raises(InputError, match=complaint):
        spec_of(**said)


@pytest.mark.parametrize(
    ("job", "complaint"),
    [
        (
            {"verb": "scan", "recipes": ["int4"]},
            r"jobs\[1\] \(scan\): recipes mean nothing to scan",
        ),
        ({"verb": "gate", "options": {"tests": "x"}}, "gate has no such option; is test meant"),
        ({"verb": "gate", "options": {"device": "any"}}, "options.device is not for options"),
        ({"verb": "sanitize", "options": {"bits": 5}}, r"options.bits: must be 4, 8 or 'auto'"),
        ({"verb": "sanitize", "options": {"seed": "x"}}, "options.seed: must be a valid integer"),
        ({"verb": "scan", "models": "c*"}, r"models 'c\*': no model of the fleet is called so"),
        ({"verb": "redteam", "suite": "detection"}, "options.data: is missing"),
    ],
)
def test_a_job_that_cannot_be_meant_is_one_line_before_any_work(place, job, complaint, one_process):
    with pytest.raises(InputError, match=complaint):
        planned(place, jobs=[job])


@pytest.mark.parametrize("axis", ["recipes", "policies", "devices"])
def test_what_is_called_by_a_name_that_nothing_has_is_said_once(place, axis, one_process):
    with pytest.raises(UsageError, match="is called 'none-such'"):
        planned(place, jobs=[{"verb": "sanitize", axis: ["none-such"]}])


def test_models_are_found_by_pattern_in_folders_and_by_name(place, one_process):
    def names(**said) -> list[str]:
        specs = spec_of(models=[said]).models
        return [one.name for one in list_models(specs, place, Fetched(place, KEY), SILENT)]

    (place / "other").mkdir()
    (place / "other" / "a.onnx").write_bytes(residual_net())
    assert names(path="models/*") == ["a.onnx", "b.onnx", "bad.pkl"]  # cards are no models
    assert names(path="models") == ["a.onnx", "b.onnx", "bad.pkl"]
    assert names(path=str(place / "models" / "a.onnx")) == ["a.onnx"]
    assert names(path="**/a.onnx") == ["models/a.onnx", "other/a.onnx"]
    with pytest.raises(InputError, match=r"models 'c\*': no file is called so"):
        names(path="c*")


def test_cells_are_the_product_of_models_recipes_policies_and_devices(place, one_process):
    job = {
        "verb": "sanitize", "recipes": ["int4", "int8"], "policies": ["demo"],
        "devices": ["x86-avx2", "x86-vnni", "mobile"], "options": {"calibration": "models"},
    }  # fmt: skip
    titles = list(planned(place, jobs=[job, {"verb": "scan", "models": "a*"}]))
    assert len(titles) == 2 * 2 * 3 + 1
    assert titles[0] == "a.onnx, sanitize, int4, demo, x86-avx2"
    assert titles[-1] == "a.onnx, scan"


def test_a_cell_is_called_by_all_that_decides_what_comes_of_it(place, one_process):
    jobs = [{"verb": "sanitize", "recipes": ["int4"], "options": {"test": "data"}}]
    (place / "data").mkdir()
    (place / "data" / "1.txt").write_text("x")

    def id_of(**said) -> str:
        return planned(place, models=[{"path": "models/a.onnx"}], **{"jobs": jobs, **said})[
            "a.onnx, sanitize, int4"
        ].id

    first = id_of()
    assert id_of(limits={"cores": 2}, name="other") == first
    seeded = [{**jobs[0], "options": {"test": "data", "seed": 1}}]
    assert id_of(jobs=seeded) != first
    for path, content in (
        ("models/a.toml", CARD.replace("0.5]", "0.4]", 1)), ("data/1.txt", "y"), ("data/2.txt", ""),
    ):  # fmt: skip
        before = id_of()
        (place / path).write_text(content)
        assert id_of() != before, path
    before = id_of()
    (place / "models" / "a.onnx").write_bytes(residual_net(3))
    assert id_of() != before


def test_what_a_factory_is_made_of_is_part_of_its_cell(place, one_process):
    (place / "net.py").write_text("def make(): ...\n")
    models = [{"path": "models/a.onnx", "options": {"arch": "net.py:make"}}]
    first = planned(place, models=models)["a.onnx, scan"].id
    (place / "layers.py").write_text("x = 1\n")
    assert planned(place, models=models)["a.onnx, scan"].id != first


def test_a_model_that_something_is_wrong_with_ends_no_other(place, one_process):
    (place / "models" / "a.toml").write_text("[input]\nshape = 3\n")
    cells = planned(place)
    assert "input.shape" in cells["a.onnx, scan"].refused
    assert cells["b.onnx, scan"].refused is None
    records = run_with(Scripted(), tuple(cells.values())).records
    assert records[cells["a.onnx, scan"].id].outcome is CellOutcome.BAD_INPUT
    assert records[cells["b.onnx, scan"].id].outcome is CellOutcome.ACCEPT


def test_options_mean_each_model_by_its_name(place, one_process):
    (place / "float").mkdir()
    for name in ("a", "b"):
        (place / "float" / f"{name}.onnx").write_bytes(residual_net())
    job = {"verb": "gate", "options": {"reference": "float/{stem}.onnx", "triggers": ["patch x=0"]}}
    cells = planned(place, jobs=[job])
    asked = cells["b.onnx, gate"].asked.options
    assert asked == {"reference": str(place / "float" / "b.onnx"), "triggers": ("patch x=0",)}


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_option_of_a_manifest_is_one_of_its_command(verb):
    node = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    node = node.commands["make"] if verb == "redteam" else node
    flags = {flag for option in node.params for flag in option.opts}
    for key, hint in SETTINGS[verb].__annotations__.items():
        if key not in {"recipe", "policy", "device", "reports", "artifacts", "command"}:
            value = {"input_shape": (1, 2, 2), "arch_args": {"width": 1}}.get(key, "x")
            (flag, *_) = arguments({key: True if "bool" in str(hint) else value})
            assert flag in flags, key


def test_options_are_written_as_a_command_line():
    said = {
        "arch_args": {"width": 16, "deep": True}, "input_shape": (3, 8, 8), "triggers": ("a", "b"),
        "run_code_from_model": True, "synthetic_calibration": False, "bits": "auto",
    }  # fmt: skip
    assert list(arguments(checked("sanitize", said, where="job"))) == [
        "--arch-args", "width=16", "--arch-args", "deep=true", "--bits", "auto",
        "--input-shape", "3,8,8", "--run-code-from-model", "--trigger", "a", "--trigger", "b",
    ]  # fmt: skip


def test_a_suite_of_the_red_team_is_a_cell_for_each_model():
    cells = list(members("detection", {"data": "digits"}, "job"))
    assert len(cells) == 40
    assert cells[0].options == {
        "attack": "pqbackdoor", "arch": "resnet18", "arch_args": {"width": 16}, "bits": 8,
        "seed": 1, "data": "digits",
    }  # fmt: skip


def test_a_factory_in_a_folder_with_too_much_code_is_refused(place, one_process, monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.facts.MOST_CODE_FILES", 1)
    for name in ("net.py", "a/one.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("")
    models = [{"path": "models/a.onnx", "options": {"arch": "net.py:make"}}]
    assert "more than 1 Python files" in planned(place, models=models)["a.onnx, scan"].refused
    monkeypatch.setattr("qdeploy.fleet.facts.MOST_CODE_FILES", 2)
    first = planned(place, models=models)["a.onnx, scan"].id
    (place / "a" / "one.py").write_text("x = 1")
    assert planned(place, models=models)["a.onnx, scan"].id != first


def test_what_a_card_calls_its_classes_decides_too(place, one_process):
    ids = set()
    for classes in ("", '[model]\nclasses = ["a", "b"]\n', '[model]\nclasses = ["b", "a"]\n'):
        (place / "models" / "a.toml").write_text(classes + CARD)
        ids.add(planned(place)["a.onnx, scan"].id)
    assert len(ids) == 3


@pytest.mark.parametrize(
    "line",
    [
        f'test = "{"a" * 300}"', f'test = "{"a/" * 3000}"', 'test = "\\u0000"', 'test = "odd"',
        'test = "pipe"', 'test = "../.."',
    ],
)  # fmt: skip
def test_a_card_ends_no_fleet_whatever_data_it_names(place, one_process, line):
    odd = place / "models" / "odd"
    odd.mkdir()
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff.png")).write_bytes(b"x")
    os.mkfifo(place / "models" / "pipe")
    (place / "models" / "a.toml").write_text(f"{CARD}[data]\n{line}\n")
    cells = planned(place, models=[{"path": "models/[ab].onnx"}])
    assert (cells["a.onnx, scan"].refused is None) == ("odd" in line)
    assert cells["b.onnx, scan"].refused is None


def test_cells_that_would_be_called_alike_are_told_apart(place, one_process):
    jobs = [{"verb": "gate", "options": {"test_images": count}} for count in (5, 6)]
    assert list(planned(place, models=[{"path": "models/a.onnx"}], jobs=jobs)) == [
        "a.onnx, gate", "a.onnx, gate (2)",
    ]  # fmt: skip


def test_one_model_under_two_names_is_computed_once_and_told_twice(place, one_process, monkeypatch):
    (place / "models" / "b.onnx").write_bytes(residual_net(0))
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, "").replace("/a.", "/*."))
    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Keeping(place))
    assert fleet() == 0
    document = read_fleet(place / "out" / "fleet.json")
    assert [record.title for record in document.cells] == ["a.onnx, scan", "b.onnx, scan"]
    assert document.computed == 1


# What is kept


def store_of(place: Path, key: bytes = KEY) -> Store:
    return Store(Folder(place / "kept"), key)


def kept(place: Path, store: Store) -> Record:
    (place / "left").mkdir(exist_ok=True)
    (place / "left" / "r.txt").write_text("said")
    sha256 = hashlib.sha256(b"said").hexdigest()
    file = WrittenFile(name="r.txt", sha256=sha256, size_bytes=4)
    record = Record(id="c1", title="t", model="m", verb="scan", outcome="ACCEPT", files=(file,))
    store.keep(record, place / "left")
    return record


def test_what_is_kept_is_read_back_by_whoever_has_the_key(tmp_path):
    record = kept(tmp_path, store_of(tmp_path))
    assert store_of(tmp_path).record("c1") == record
    assert store_of(tmp_path, bytes(32)).record("c1") is None
    assert store_of(tmp_path).fetch(record, tmp_path / "out")
    assert (tmp_path / "out" / "r.txt").read_text() == "said"


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed", "folder", "pipe"])
def test_what_is_not_as_it_was_kept_is_not_done(tmp_path, damage):
    kept(tmp_path, store_of(tmp_path))
    store = store_of(tmp_path)
    cell = tmp_path / "kept" / "cells" / "c1"
    if damage == "cut":
        cell.write_bytes(cell.read_bytes()[:-9])
    elif damage == "changed":
        cell.write_bytes(cell.read_bytes().replace(b"ACCEPT", b"REJECT"))
    elif damage == "renamed":
        cell.rename(cell.with_name("c2"))
    else:
        cell.unlink()
        cell.mkdir() if damage == "folder" else os.mkfifo(cell)
    assert store.record("c1") is None
    assert store.record("c2") is None


def test_a_file_of_another_content_is_not_handed_out(tmp_path):
    record, store = kept(tmp_path, store_of(tmp_path)), store_of(tmp_path)
    (tmp_path / "kept" / "files" / record.files[0].sha256).write_text("lied")
    assert not store.whole(record)
    assert not store.fetch(record, tmp_path / "out")
    store.keep(record, tmp_path / "left")  # which mends it
    assert store.fetch(record, tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".x", "a//b", ""])
def test_a_record_names_no_file_outside_of_its_cell(name):
    with pytest.raises(ValueError, match="name"):
        WrittenFile(name=name, sha256="0" * 64, size_bytes=1)


def test_a_cell_is_claimed_by_one_at_a_time(tmp_path):
    blobs = Folder(tmp_path)
    with blobs.claim("c1") as first, Folder(tmp_path).claim("c1") as second:
        assert (first, second) == (True, False)
    with blobs.claim("c1") as again:
        assert again


def test_a_store_at_a_url_keeps_the_same(tmp_path):
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/remote"
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    store = open_store(url, tmp_path / "key")
    assert store.record("c1") is None
    record = kept(tmp_path, store)
    assert open_store(url, tmp_path / "key").record("c1") == record
    assert store.fetch(record, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "remote" / "cells").iterdir()) == ["c1"]
    with store.blobs.claim("c1") as first, store.blobs.claim("c1") as second:
        assert first
        assert second  # nobody can be kept out
    for nowhere in ("nothing://x", "local://", "://x", "ftp://127.0.0.1:1/x", "zip://a"):
        with pytest.raises(QdeployError, match="store"):
            open_store(nowhere, tmp_path / "key")


def test_seeds_come_of_the_key_that_machines_share(tmp_path, monkeypatch):
    numbers = []
    for content in (KEY, KEY, bytes(32)):
        path = tmp_path / f"key{len(numbers)}"
        path.write_bytes(content)
        path.chmod(0o600)
        monkeypatch.setenv(KEY_VARIABLE, str(path))
        numbers.append(private_number("model"))
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [(KEY, 0o644, "others can read"), (KEY[:-1], 0o600, "is not of 32 bytes"),
     (KEY + b"\n", 0o600, "is not of 32 bytes"), (None, 0, "No such file")],
)  # fmt: skip
def test_a_key_that_is_none_is_one_line(tmp_path, content, mode, complaint):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(InputError, match=complaint):
        open_store(str(tmp_path), path)


# Processes


def python(code: str, limits: Limits, folder: Path, stop: Event | None = None):
    started = Spawned(()).start(["-c", code], limits, folder / "log", {})
    return watch(started, limits, stop or Event())


def test_a_command_ends_as_it_ends(tmp_path):
    end = python("print('said'); raise SystemExit(3)", LIMITS, tmp_path)
    assert (end.result.code, end.exceeded, end.stopped) == (3, None, False)
    assert end.result.cpu_seconds > 0
    assert end.result.peak_bytes > 1 << 20
    assert (tmp_path / "log").read_text() == "said\n"
    assert (
        python("import os; os.kill(os.getpid(), 9)", LIMITS, tmp_path).result.code
        == -signal.SIGKILL
    )


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    code = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    monkeypatch.setattr("qdeploy.fleet.process.LEAVE_SECONDS", 0.2)
    started = Spawned(()).start(["-c", code], LIMITS, tmp_path / "log", {})
    await_text(tmp_path / "log")  # its time is counted from when it is waited for
    end = watch(started, Limits(1.5, None, 1), Event())
    assert end.exceeded == "takes more than 0.025 minutes"
    await_end(int((tmp_path / "log").read_text()))


def await_text(path: Path) -> None:
    """Until somebody has written a line into it."""
    for _ in range(600):
        if path.exists() and path.read_text().endswith("\n"):
            return
        time.sleep(0.1)
    pytest.fail("says nothing")


def await_end(process: int) -> None:
    """Until it is gone, or nobody has asked yet how it ended."""
    for _ in range(600):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("is still there")


def test_a_command_that_takes_too_much_memory_is_ended(tmp_path):
    code = "import time; held = b'x' * (300 << 20); time.sleep(600)"
    end = python(code, Limits(120, 200_000_000, 1), tmp_path)
    assert end.exceeded == "takes more than 0.2 GB"


def test_a_command_is_ended_by_whoever_waits_for_it(tmp_path):
    stop = Event()
    Timer(0.5, stop.set).start()
    end = python("import time; time.sleep(600)", LIMITS, tmp_path, stop)
    assert end.stopped
    assert end.result.code == -signal.SIGTERM


def test_a_command_has_the_cores_that_it_is_given(tmp_path):
    own = min(os.sched_getaffinity(0))
    code = "import os; print(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"
    python(code, replace(LIMITS, pinned=frozenset({own})), tmp_path)
    assert (tmp_path / "log").read_text() == f"{{{own}}} 1\n"


def test_a_command_does_not_outlive_the_process_that_started_it(tmp_path):
    code = f"""
import sys
from pathlib import Path
from threading import Event
from qdeploy.fleet.process import Limits, Spawned, watch
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
limits, log = Limits(600, None, 1), Path({str(tmp_path / "inner")!r})
watch(Spawned(()).start(["-c", code], limits, log, {{}}), limits, Event())
"""
    outer = subprocess.Popen([sys.executable, "-c", code])
    await_text(tmp_path / "inner")
    outer.kill()
    outer.wait()
    await_end(int((tmp_path / "inner").read_text()))


def test_forked_commands_are_as_alone_as_spawned_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forks, own = Forks(1, ()), min(os.sched_getaffinity(0))
    limits = replace(LIMITS, pinned=frozenset({own}))
    try:
        first = forks.start(["--version"], limits, tmp_path / "log", {})
        second = forks.start(["info", "none.onnx"], limits, tmp_path / "other", {})
        assert watch(first, limits, Event()).result.code == 0
        assert watch(second, limits, Event()).result.code == 2
        assert (tmp_path / "log").read_text().startswith("qdeploy ")
        assert "error: model none.onnx: No such file" in (tmp_path / "other").read_text()

        (tmp_path / "fleet.toml").write_text(MANIFEST)
        (tmp_path / "status.json").write_text(status().model_dump_json())
        endless = ["fleet", "fleet.toml", "--out", ".", "--watch"]
        process = forks.start(endless, LIMITS, tmp_path / "log", {})
        assert process.poll() is None
        forks._server.kill()  # and with it all that it has forked
        assert watch(process, LIMITS, Event()).result.code == -signal.SIGKILL
        await_end(process.pid)
        again = forks.start(["--version"], LIMITS, tmp_path / "log", {})
        assert watch(again, LIMITS, Event()).result.code == 0
    finally:
        forks.close()


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


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.drive.pause_before", lambda _: 0.0)
    monkeypatch.setattr("qdeploy.fleet.drive.ELSEWHERE_SECONDS", 0.0)


def cells(count: int) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"id{i}", Asked("scan", Path(f"m{i}.onnx"), f"m{i}.onnx", {}), f"m{i}.onnx, scan")
        for i in range(count)
    )


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


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["ACCEPT", "DONE"], Outcome.ACCEPT),
        (["ACCEPT", "NO VERDICT"], Outcome.NO_VERDICT),
        (["ACCEPT", "FAILED"], Outcome.NO_VERDICT),
        (["ACCEPT", "BAD INPUT"], Outcome.NO_VERDICT),
        (["FAILED", "REJECT", "ACCEPT"], Outcome.REJECT),
        ([], Outcome.ACCEPT),
    ],
)
def test_the_verdict_over_all_is_that_of_the_worst_cell(outcomes, expected):
    assert whole(record(str(i), outcome=o) for i, o in enumerate(outcomes)) is expected


def record(name: str, **said) -> Record:
    return Record(
        **{"id": name, "title": name, "model": name, "verb": "gate", "outcome": "ACCEPT", **said}
    )


def test_what_has_changed_is_told_by_cell():
    before = [record("a"), record("b"), record("c", sha256="1" * 64), record("d")]
    now = [record("a"), record("b", outcome="REJECT"), record("c", sha256="2" * 64), record("e")]
    found = {one.title: (one.before, one.now) for one in changes(before, now)}
    assert found == {
        "b": ("ACCEPT", "REJECT"),
        "c": ("ACCEPT, file 111111111111", "ACCEPT, file 222222222222"),
        "d": ("ACCEPT", None),
        "e": (None, "ACCEPT"),
    }


def document(*records: Record) -> FleetDocument:
    return FleetDocument(
        schema_version=1, name="f", outcome="ACCEPT", version="0", started="", seconds=1.0,
        computed=0, cells=records,
    )  # fmt: skip


def test_names_of_strangers_are_texts_on_the_page_and_in_the_table():
    hostile = record("x", model="<script>alert(1)</script>", reason="=cmd|' /C calc'!A0\u202e")
    page = to_html(document(hostile)).decode()
    assert "<script>alert(1)" not in page
    assert page.count("<script>") == 1
    assert "\u202e" not in page
    row = list(csv.reader(io.StringIO(to_csv(document(hostile)).decode())))[1]
    assert "'=cmd|' /C calc'!A0\\u202e" in row


def test_a_page_shows_the_worst_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.forms.MOST_ROWS", 1)
    page = to_html(document(record("good"), record("bad", outcome="REJECT"))).decode()
    assert ">bad<" in page
    assert ">good<" not in page
    assert "2 cells." in page
    assert "These are the 1 worst; all are in fleet.json." in page


def test_the_script_of_the_page_is_the_one_that_its_policy_names():
    page = to_html(document(record("x"))).decode()
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'")


def test_a_report_is_written_as_its_name_asks(place, one_process):
    with pytest.raises(UsageError, match="a fleet is written as"):
        render(document(), Path("x.md"))
    assert fleet("--report", "x.md") == 2


# Schedulers

SLURM = """\
#!/bin/sh
#SBATCH --job-name=two
#SBATCH --array=0-1
#SBATCH --cpus-per-task=2
#SBATCH --time=50
#SBATCH --mem=3815M
#SBATCH --partition=edge
#SBATCH --requeue
#SBATCH --output=/o/slurm-%A-%a.log
# 2 cells. After it: qdeploy fleet /m/fleet.toml --out /o
module load python
exec qdeploy fleet /m/fleet.toml --out /o --executor local --workers 1 \\
  --share "$SLURM_ARRAY_TASK_ID/2"
"""


def job_of(count: int = 2, **said) -> Job:
    limits = {"minutes": 10, "cores": 2, "memory_gb": 2, "retries": 3}
    spec = spec_of(**{"limits": limits, **said})
    return Job(spec, Path("/m/fleet.toml"), Path("/o"), cells(count))


def test_a_job_array_of_slurm():
    emit = {"slurm": {"partition": "edge", "lines": ["module load python"]}}
    assert to_slurm(job_of(emit=emit)) == SLURM
    assert "--array=0-999\n" in to_slurm(job_of(2500))
    assert "--time=130\n" in to_slurm(job_of(2500))  # three cells each


def test_a_device_with_a_gpu_is_asked_for():
    job = job_of()
    asked = replace(job.cells[0].asked, device="cuda")
    on_gpu = replace(job, cells=[Cell("id", asked, "t")])
    assert "--gres=gpu:1\n" in to_slurm(on_gpu)


def test_an_indexed_job_of_kubernetes():
    k8s = {"image": "registry/qdeploy:1", "claim": "models", "key_secret": "fleet"}
    table = json.loads(to_k8s(job_of(emit={"k8s": k8s})))
    (container,) = table["spec"]["template"]["spec"]["containers"]
    assert (table["kind"], table["metadata"]["name"]) == ("Job", "two")
    assert (table["spec"]["completions"], table["spec"]["completionMode"]) == (2, "Indexed")
    assert container["command"] == ["qdeploy"]
    assert container["args"] == [
        "fleet", "/fleet/fleet.toml", "--out", "/fleet/out", "--executor", "local",
        "--workers", "1", "--share", "$(JOB_COMPLETION_INDEX)/2",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "3815Mi"}
    assert container["env"] == [{"name": "QDEPLOY_KEY", "value": "/key/key"}]
    with pytest.raises(UsageError, match="in which container"):
        to_k8s(job_of())


@pytest.mark.parametrize("where", [{"manifest": Path("/m\ntouch x #/f")}, {"out": Path("/o\x1b")}])
def test_a_script_has_no_names_with_lines_of_their_own(where):
    with pytest.raises(UsageError, match="cannot be written into a script"):
        to_slurm(replace(job_of(), **where))


@pytest.mark.parametrize("content", ["[]", "x", '{"name": 1}', "{}"])
def test_a_status_that_is_none_is_one_line(place, one_process, content):
    (place / "out").mkdir()
    assert fleet("--watch") == 2  # none has begun
    (place / "out" / "status.json").write_text(content)
    assert fleet("--watch") == 2
    (place / "out" / "status.json").write_text(status(process=999_999_999).model_dump_json())
    assert fleet("--watch") == 2  # it has ended before the last cell


def test_an_executor_that_is_not_installed_is_one_line(place, monkeypatch, one_process):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert fleet("--executor", "ray") == 2


def test_cells_on_a_ray_cluster_are_the_same(place):
    pytest.importorskip("ray", reason="needs ray")
    assert fleet("--executor", "ray") == 3
    document = read_fleet(place / "out" / "fleet.json")
    assert [r.outcome.value for r in document.cells] == ["ACCEPT", "REJECT"]
