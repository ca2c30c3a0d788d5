"""Nothing is sent anywhere, and nothing written to the user's home that is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nets import residual_net

ALLOWED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT")


def leaves_behind(home: Path, *command: str, **more: str) -> list[str]:
    """What a command without any of our settings in its environment leaves in its home."""
    home.mkdir()
    bare = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    subprocess.run(
        [sys.executable, *command], env=bare | {"HOME": str(home)} | more, cwd=home.parent,
        check=True, capture_output=True,
    )  # fmt: skip
    return [str(path.relative_to(home)) for path in home.rglob("*")]


def test_a_run_of_a_model_leaves_no_trace_of_telemetry(tmp_path):
    (tmp_path / "model.onnx").write_bytes(residual_net())
    code = (
        "from pathlib import Path; from qdeploy.runtime.sessions import open_session;"
        " open_session(Path('model.onnx').read_bytes())"
    )
    assert leaves_behind(tmp_path / "home", "-c", code) == []


def test_what_the_user_has_set_is_left_alone(tmp_path):
    code = "import os, qdeploy; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    assert leaves_behind(tmp_path / "home", "-c", code, ORT_DISABLE_TELEMETRY="0") == []


@pytest.mark.parametrize("verb", [("scan",), ("export", "--out", "out.onnx")])
def test_a_command_leaves_nothing_in_the_home(tmp_path, verb):
    (tmp_path / "model.onnx").write_bytes(residual_net())
    command = ("-m", "qdeploy", verb[0], "model.onnx", *verb[1:])
    assert leaves_behind(tmp_path / "home", *command) == []
