"""Killed at any write, a full disk at any write, two runs in one directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from qdeploy.runs import rundir
from tests.gate_lab import run

KILLER = """
import os, signal, sys
from pathlib import Path
from qdeploy.cli import main
remaining = int(sys.argv.pop(1))
rename = Path.replace
def deadly(self, target):
    global remaining
    remaining -= 1
    if remaining < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = deadly
main()
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, poisoned) -> Path:
    """The poisoned model as ONNX, its card and data, and a file that an earlier run has made."""
    folder = tmp_path_factory.mktemp("lab")
    for path in (*poisoned.glob("model.*"), *poisoned.glob("digits-*.npz")):
        (folder / path.name).write_bytes(path.read_bytes())
    assert run("export", folder / "model.pt", "--out", folder / "fp32.onnx") == 0
    (folder / "fp32.toml").write_bytes((folder / "model.toml").read_bytes())
    return folder


@pytest.fixture
def work(lab, tmp_path, monkeypatch) -> Path:
    for path in lab.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


SANITIZE = (
    "sanitize", "fp32.onnx", "--out", "model.onnx", "--policy", "demo", "--seed", "1",
    "--report", "report.json", "--report", "report.html",
)  # fmt: skip


def whole(folder: Path) -> set[str]:
    """The names of the files, each of which must be complete."""
    names = set()
    for path in folder.rglob("*"):
        if not path.is_file() or path.is_symlink() or path.name.startswith("."):
            continue
        names.add(path.name)
        if path.suffix == ".onnx":
            onnx.checker.check_model(str(path), full_check=True)
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".html":
            assert path.read_text("utf-8").rstrip().endswith("</html>")
    return names


def sealed(folder: Path) -> bool:
    """The manifest is there, and every sum in it is right."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return False
    sums = json.loads(manifest.read_text("utf-8"))
    return all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == known
        for name, known in sums.items()
    )


def run_folders(work: Path) -> list[Path]:
    return [path for path in (work / "artifacts").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_killed_at_any_write_a_run_leaves_whole_files_and_goes_on(work):
    """SIGKILL, which nobody can catch, before each rename; the next run goes on where it died."""
    deaths = 0
    for allowed in (*range(9), *range(9, 40, 3)):
        command = [sys.executable, "-c", KILLER, str(allowed), *SANITIZE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        names = whole(work)
        if "model.onnx" in names:  # there is no file without its evidence
            assert {"report.json", "report.html"} <= names
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        deaths += 1
    assert done.returncode == 0
    assert deaths >= 5
    (folder,) = run_folders(work)
    assert sealed(folder)
    left = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert left == []
    again = work / "again.onnx"
    assert run(*SANITIZE[:2], "--out", again, *SANITIZE[4:], "--artifacts", "other") == 0
    assert again.read_bytes() == (work / "model.onnx").read_bytes()


@pytest.mark.slow
def test_a_gate_that_is_killed_leaves_no_half_verdict(work):
    """A report is there as a whole or not at all, and the next gate comes to its end."""
    assert run("export", "fp32.onnx", "--out", "file.onnx") == 0
    gate = ("gate", "file.onnx", "--reference", "fp32.onnx", "--policy", "demo",
            "--report", "report.json", "--report", "junit.xml")  # fmt: skip
    deaths = 0
    for allowed in range(40):
        command = [sys.executable, "-c", KILLER, str(allowed), *gate]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "report.json" in whole(work) or "junit.xml" not in whole(work)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        deaths += 1
    assert done.returncode == 0, done.stderr
    assert deaths >= 5
    assert sealed(run_folders(work)[0])
    assert json.loads((work / "report.json").read_text("utf-8"))["outcome"] == "ACCEPT"


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_what_was_there(work, monkeypatch, capsys):
    """At every write of the run in turn; then there is room again."""
    assert run(*SANITIZE) == 0
    before = (work / "model.onnx").read_bytes()
    fsync, failures, room = os.fsync, 0, 0

    def full(handle: int) -> None:
        nonlocal room
        room -= 1
        if room == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(rundir.os, "fsync", full)
    for allowed in range(0, 100, 2):  # every second one is that of a folder
        room = allowed
        capsys.readouterr()
        code = run(*SANITIZE)
        said = capsys.readouterr().err
        whole(work)
        made = work / "model.onnx"  # of an earlier run, it is out of the way; of this one, whole
        assert not made.exists() or made.read_bytes() == before
        if room >= 0:
            break
        if code == 0:  # what was to be kept for later runs is no loss
            assert made.exists()
            continue
        assert (work / "model.previous.onnx").read_bytes() == before
        failures += 1
        assert code == 2
        assert said.count("error: ") == 1
        assert "No space left on device" in said
        assert "Traceback" not in said
    assert code == 0
    assert (work / "model.onnx").read_bytes() == before
    assert failures >= 8, failures
    assert sealed(run_folders(work)[0])


@pytest.mark.slow
def test_two_runs_at_a_time_in_one_directory_do_not_mix(work):
    """Two of different seeds both end well; two of the same, one says that the other is at it."""
    program = [sys.executable, "-m", "qdeploy"]
    other = [*SANITIZE[:7], "2", *SANITIZE[8:]]
    commands = [[*program, *SANITIZE], [*program, *other], [*program, *SANITIZE]]
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    ends = [(process.communicate()[1], process.returncode) for process in running]
    codes = [code for _, code in ends]
    assert codes[1] == 0, ends[1]
    assert sorted({codes[0], codes[2]}) in ([0], [0, 2]), ends
    for said, code in ends:
        assert code == 0 or "under way in another process" in said
    whole(work)
    folders = run_folders(work)
    assert len(folders) == 2
    assert all(map(sealed, folders))
    made = {(folder / "result.onnx").read_bytes() for folder in folders}
    assert (work / "model.onnx").read_bytes() in made
