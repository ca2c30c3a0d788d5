"""Where torch is not installed: what works on ONNX files alone does, and the rest says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import gate_lab

RUN = """
import sys
from qdeploy.cli import main
for line in sys.stdin:
    try:
        main(line.split())
    except SystemExit as leaving:
        print("EXIT", leaving.code or 0, flush=True)
    sys.stderr.flush()
"""
NO_TORCH = "import sys; sys.modules['torch'] = None"  # in every interpreter that is started
WORK = ("fp32.onnx", "--artifacts", "a", "--seed", "0")
COMMANDS = {
    "quantize --out q.onnx": (("quantize", *WORK, "--out", "q.onnx"), 0, "4 layers"),
    "gate": (("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo"), 0, "ACCEPT"),
    "scan": (("scan", "model.pt"), 0, "torch, which opens it, is not installed"),
    "gate of a checkpoint": (
        ("gate", "good.onnx", "--reference", "model.pt"), 2, "model.pt: a torch file needs torch",
    ),
    "a method that trains": (
        ("quantize", *WORK, "--out", "p.onnx", "--rounding", "pdquant"), 2,
        "rounding pdquant needs torch",
    ),
    "a method that weighs": (
        ("quantize", *WORK, "--out", "b.onnx", "--rounding", "brecq", "--solver", "descent"), 2,
        "rounding brecq-descent needs torch",
    ),
    "clean": (
        ("clean", "model.pt", "--images", "digits-train.npz", "--out", "s.pt"), 2,
        "cleaning a model needs torch",
    ),
    "demo": (("demo", "--out", "d"), 2, "the demo needs torch"),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(lab_files, tmp_path_factory) -> dict[str, str]:
    """What every command has said, by its name; the last line holds the exit code."""
    folder = tmp_path_factory.mktemp("light") / "lab"
    (folder.parent / "sitecustomize.py").write_text(NO_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(folder.parent)}
    with gate_lab.copied(lab_files, folder):
        lines = "".join(" ".join(command) + "\n" for command, _, _ in COMMANDS.values())
        done = subprocess.run(
            [sys.executable, "-c", RUN], input=lines, cwd=folder, env=environment, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    parts, rest = [], done.stdout
    for code in [line for line in done.stdout.splitlines() if line.startswith("EXIT ")]:
        part, rest = rest.split(code + "\n", 1)
        parts.append(f"{part}{code}")
    return dict(zip(COMMANDS, parts, strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_without_torch_or_says_what_it_is_needed_for(said, name):
    _, code, text = COMMANDS[name]
    assert said[name].splitlines()[-1] == f"EXIT {code}", said[name]
    assert text in " ".join(said[name].split()), said[name]
    assert "Traceback" not in said[name]
    if code == 2:
        assert "hint: pip install 'torch>=2.9,<2.14'" in said[name]
