from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qdeploy.disk.files import require_writable, set_aside, write_atomically
from qdeploy.errors import OutputError, UsageError
from qdeploy.runs.rundir import open_run


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    write_atomically(path, b"old")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, b"new, and much longer")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "model.onnx", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_no_partial_file(tmp_path):
    """Not even SIGKILL: the name holds one of the two contents, never a part."""
    path = tmp_path / "model.onnx"
    script = (
        "import sys; from pathlib import Path; from qdeploy.disk.files import write_atomically\n"
        "path = Path(sys.argv[1])\nprint('ready', flush=True)\n"
        "while True:\n    [write_atomically(path, bytes([b]) * 5_000_000) for b in (65, 66)]\n"
    )
    for delay in np.linspace(0.01, 0.2, 6):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 5_000_000
            assert len(set(data)) == 1


def test_files_are_readable_for_others_as_the_umask_says(tmp_path):
    path = tmp_path / "model.onnx"
    write_atomically(path, b"data")
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("", "is a folder"), ("missing/model.onnx", "does not exist"), ("/proc/model.onnx", "/proc")],
)
def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, name, complaint):
    with pytest.raises(OutputError, match=complaint):
        require_writable(tmp_path / name)
    assert leftovers(tmp_path) == []


def test_a_file_is_set_aside_and_not_lost(tmp_path):
    path = tmp_path / "model.onnx"
    assert set_aside(path) is None
    path.write_bytes(b"of an earlier run")
    aside = set_aside(path)
    assert aside == tmp_path / "model.previous.onnx"
    assert aside.read_bytes() == b"of an earlier run"
    assert not path.exists()


def test_what_is_kept_is_of_all_that_decides_and_not_of_a_name_that_two_runs_share(tmp_path):
    arrays = {"codes": np.arange(3, dtype=np.int8)}
    with open_run(tmp_path, "abc", "abc1") as run:
        run.layers.save("conv", arrays)
        run.predictions.save(3, arrays)
    with open_run(tmp_path, "abc", "abc2") as other:
        assert other.layers.load("conv") is None
        assert other.predictions.load() is None
    with open_run(tmp_path, "abc", "abc1") as again:
        assert again.layers.load("conv") is not None


def test_a_complete_run_has_a_manifest_of_its_files(tmp_path):
    with open_run(tmp_path, "abc") as run:
        run.write("model.onnx", b"data")
        run.layers.save("conv1", {"codes": np.zeros(3)})
        run.seal()
    manifest = json.loads((tmp_path / "abc" / "manifest.json").read_text())
    assert manifest == {"model.onnx": hashlib.sha256(b"data").hexdigest()}
    assert not (tmp_path / "abc" / "partial").exists()


def test_an_interrupted_run_finds_what_it_had_and_a_complete_one_starts_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, "abc") as run:  # noqa: PT012
        run.layers.save("layer1.0/conv", {"codes": np.arange(3)})
        run.predictions.save(7, {"clean": np.arange(9)})
        raise KeyboardInterrupt
    with open_run(tmp_path, "abc") as run:
        stored = run.layers.load("layer1.0/conv")
        assert stored is not None
        np.testing.assert_array_equal(stored["codes"], np.arange(3))
        assert (
            run.layers.load("layer1.0_conv") is None
        )  # another layer, whatever its file is called
        answers = run.predictions.load()
        assert answers is not None
        assert answers[0] == 7
        run.seal()
    with open_run(tmp_path, "abc") as run:
        assert run.layers.load("layer1.0/conv") is None
        assert run.predictions.load() is None


def test_two_processes_cannot_be_at_the_same_run(tmp_path):
    with open_run(tmp_path, "abc"):
        with (
            pytest.raises(UsageError, match="under way in another process"),
            open_run(tmp_path, "abc"),
        ):
            pass
        with open_run(tmp_path, "other"):
            pass


def test_a_root_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), open_run(tmp_path / "file", "abc"):
        pass
