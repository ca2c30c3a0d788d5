"""An interrupt comes when it can be borne: not in the middle of an import, and not never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest


def test_an_interrupt_waits_until_a_module_is_imported(tmp_path):
    """In the middle of it, libraries in C++ would abort."""
    (tmp_path / "half.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\n"
        "print('imported', flush=True)\n"
    )
    code = (
        "import qdeploy.runs.info, time\n"
        "def facts(_):\n    import half\n    time.sleep(60)\n    return ()\n"
        "qdeploy.runs.info.facts = facts\n"
        "from qdeploy.cli import main\nmain(['info', 'm.onnx'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "imported\n"), done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.parametrize(("signals", "seconds"), [(1, 9), (2, 0)])
def test_an_import_that_never_ends_does_not_hold_an_interrupt_back(tmp_path, signals, seconds):
    """A second one does not wait; the first for ten seconds."""
    (tmp_path / "endless.py").write_text("import time\nwhile True:\n    time.sleep(0.01)\n")
    code = (
        "import qdeploy.runs.info\n"
        "def facts(_):\n    print('there', flush=True)\n    import endless\n"
        "qdeploy.runs.info.facts = facts\n"
        "from qdeploy.cli import main\nmain(['info', 'm.onnx'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        for _ in range(signals):
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began > seconds
    assert b"Traceback" not in err
