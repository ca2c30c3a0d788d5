"""A cell is a command in a process of its own, with limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import pytest

from qdeploy.fleet.forks import Forks
from qdeploy.fleet.process import Limits, Spawned, watch
from tests.fleet_lab import (
    LIMITS,
    MANIFEST,
    status,
)


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
