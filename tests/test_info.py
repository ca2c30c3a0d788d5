"""What `qdeploy info` says of a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from qdeploy.cli import app
from qdeploy.errors import InputError
from qdeploy.runs.info import facts
from tests import test_ends as ends
from tests.nets import residual_net


def test_a_graph_says_what_it_takes_and_computes_with(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(residual_net())
    said = dict(facts(path))
    assert said["format"] == "ONNX"
    assert said["input"] == "image: float (N, 3, 8, 8)"
    assert said["weights"].endswith(" float")
    assert said["quantized"] == "no"
    assert "Conv 5" in said["operators"]
    assert said["model card"].startswith("none")
    (tmp_path / "model.toml").write_text("[input]\n")
    assert dict(facts(path))["model card"] == str(tmp_path / "model.toml")


def test_every_output_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(ends.several_outputs())
    assert [name for name, _ in facts(path)].count("output") > 1


def test_tensors_alone_say_that_they_need_an_architecture(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    said = dict(facts(tmp_path / "model.safetensors"))
    assert said["tensors"] == "2"
    assert "architecture" in said["holds"]


def test_a_program_is_named_and_not_opened(tmp_path):
    script = torch.jit.script(torch.nn.ReLU())
    torch.jit.save(script, tmp_path / "model.pt")
    assert dict(facts(tmp_path / "model.pt"))["holds"].startswith("TorchScript")


def test_what_is_no_model_is_one_line(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"something else")
    with pytest.raises(InputError):
        list(facts(tmp_path / "model.onnx"))


def test_the_command_prints_it(tmp_path):
    (tmp_path / "model.onnx").write_bytes(residual_net())
    done = CliRunner().invoke(app, ["info", str(tmp_path / "model.onnx")])
    assert done.exit_code == 0
    assert "image: float (N, 3, 8, 8)" in done.output
