"""Results go where they were asked to go, over nothing that was read, and no old one stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import gate_lab
from tests.gate_lab import run

POLICIES = Path(__file__).parents[1] / "recipes" / "policies"
SANITIZE = ("sanitize", "model.pt", "--policy", "demo", "--seed", "1")
GATE = ("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo")


@pytest.fixture(scope="module")
def files(tmp_path_factory, lab_files) -> Path:
    folder = tmp_path_factory.mktemp("places")
    with gate_lab.copied(lab_files, folder):
        shutil.copy("fp32.onnx", "model.json")
        patch = 'kind = "patch"\ntarget = 0\nx = 6\ny = 6\nwidth = 2\nheight = 2\ncolor = [1.0]\n'
        Path("trigger.toml").write_text(f"[[trigger]]\n{patch}")
        os.link("model.pt", "hard.pt")
        Path("soft.json").symlink_to("model.json")
        shutil.copy(POLICIES / "demo.toml", "policy.toml")
        yield folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "model.json", "--report", "model.json"),
        ("scan", "model.json", "--report", "./runs/../model.json"),
        ("scan", "model.json", "--report", "soft.json"),
        ("gate", "model.json", "--card", "model.toml", "--policy", "standalone", "--report",
         "model.json"),
        (*GATE, "--made-by", "good.json", "--report", "good.json"),
        ("quantize", "model.pt", "--out", "model.pt"),
        ("quantize", "model.pt", "--out", "hard.pt"),
        ("export", "model.pt", "--out", "model.pt"),
        ("quantize", "model.pt", "--out", "model.toml"),
        (*SANITIZE, "--out", "digits-test.npz"),
        (*SANITIZE, "--out", "q.json", "--report", "q.json"),
        (*SANITIZE, "--out", "q.onnx", "--report", "r.json", "--report", "r.json"),
        ("sanitize", "model.pt", "--policy", "policy.toml", "--out", "policy.toml"),
        (*SANITIZE, "--trigger", "trigger.toml", "--out", "trigger.toml"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_result_goes_over_what_is_read(files, arguments, capsys):
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    assert run(*arguments) == 2
    assert "would be lost" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in files.iterdir() if path.is_file()}


@pytest.mark.parametrize("place", ["loop", "\\u0000", "loop/below"])
def test_a_card_whose_places_lead_nowhere_is_one_line(files, place, capsys):
    """Links in a circle, or no path at all."""
    if not Path("loop").is_symlink():
        Path("loop").symlink_to("loop")
    text = Path("model.toml").read_text("utf-8").replace("digits-test.npz", place)
    Path("odd.toml").write_text(text, "utf-8")
    for command in (GATE, ("sanitize", "model.pt", "--out", "never.onnx")):
        assert run(*command, "--card", "odd.toml", "--report", "r.json") == 2
        assert capsys.readouterr().err.count("error: ") == 1


def test_a_key_behind_links_in_a_circle_is_one_line(files, capsys):
    if not Path("loop").is_symlink():
        Path("loop").symlink_to("loop")
    command = ("attest", "good.onnx", "--report", "good.json", "--key", "loop")
    assert run(*command, "--out", "e.json") == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize("verb", [SANITIZE, ("quantize", "model.pt", "--seed", "1")])
def test_a_result_of_an_earlier_run_is_not_left_to_be_taken_for_this_one_s(files, verb):
    shutil.copy("model.pt", "whole.pt")
    try:
        assert run(*verb, "--out", "out.onnx") == 0
        made = Path("out.onnx").read_bytes()
        Path("model.pt").write_bytes(made[:1000])  # the model is damaged meanwhile
        assert run(*verb, "--out", "out.onnx") == 2
        assert not Path("out.onnx").exists()
        assert Path("out.previous.onnx").read_bytes() == made
    finally:
        shutil.move("whole.pt", "model.pt")
