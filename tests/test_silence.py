"""Nothing is sent anywhere, and nothing written to the user's home that is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nets import residual_net

ROOT = Path(__file__).parents[1]
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


def test_a_module_that_lies_beside_the_model_is_not_imported(tmp_path):
    (tmp_path / "model.onnx").write_bytes(residual_net())
    for name in ("onnx", "torch", "numpy", "qdeploy", "fickling"):
        (tmp_path / f"{name}.py").write_text("open('MARKER', 'w')\nraise SystemExit(9)\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from qdeploy.cli import main; main(['scan', 'model.onnx'])"
    )
    assert leaves_behind(tmp_path / "home", "-P", "-c", code) == []
    assert not (tmp_path / "MARKER").exists()


def test_a_script_without_a_guard_may_call_the_command(tmp_path):
    """A process that looks at files must not run the caller's script again."""
    (tmp_path / "model.onnx").write_bytes(residual_net())
    (tmp_path / "script.py").write_text(
        "open('runs', 'a').write('once\\n')\n"
        "from qdeploy.cli import main\nmain(['scan', 'model.onnx'])\n"
    )
    leaves_behind(tmp_path / "home", "script.py", PYTHONPATH=str(ROOT))
    assert (tmp_path / "runs").read_text() == "once\n"


def test_what_the_user_has_set_is_left_alone(tmp_path):
    code = "import os, qdeploy; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    assert leaves_behind(tmp_path / "home", "-c", code, ORT_DISABLE_TELEMETRY="0") == []


@pytest.mark.parametrize("verb", [("scan",), ("export", "--out", "out.onnx")])
def test_a_command_leaves_nothing_in_the_home(tmp_path, verb):
    (tmp_path / "model.onnx").write_bytes(residual_net())
    command = ("-m", "qdeploy", verb[0], "model.onnx", *verb[1:])
    assert leaves_behind(tmp_path / "home", *command) == []
