"""The package as a library: what the command line does, as functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy.machine import cores, limited_to
from tests import gate_lab
from tests.gate_lab import run

EXAMPLE = re.compile(r"^ {4}(.*)$", re.MULTILINE)


@pytest.fixture
def lab(tmp_path, lab_files):
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        yield lab


def test_every_public_name_is_there_and_documented():
    assert set(qdeploy.__all__) <= set(dir(qdeploy))
    for name in qdeploy.__all__:
        assert getattr(qdeploy, name).__doc__, name
        assert re.search(rf"\b{name}\b", qdeploy.__doc__), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        qdeploy.nothing  # noqa: B018


def test_importing_it_loads_nothing_heavy():
    heavy = "{'torch', 'onnx', 'onnxruntime', 'pydantic', 'typer'} & {*sys.modules}"
    said = subprocess.run(
        [sys.executable, "-c", f"import sys, qdeploy; qdeploy.QdeployError; print({heavy})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "set()\n"


def test_it_says_that_it_is_typed():
    assert (Path(qdeploy.__file__).parent / "py.typed").exists()


def test_the_example_runs(lab):
    example = "\n".join(EXAMPLE.findall(qdeploy.__doc__))
    (lab / "fp32.onnx").rename("model.onnx")
    (lab / "fp32.toml").rename("model.toml")
    names: dict[str, object] = {}
    exec(example, names)  # noqa: S102
    report = names["report"]
    assert isinstance(report, qdeploy.Report)
    assert report.outcome is qdeploy.Outcome.ACCEPT
    assert report.command.startswith("qdeploy.sanitize('model.onnx', 'model.int4.onnx', bits=4")
    assert {"accuracy_drop", "attack_success"} <= {check.name for check in report.checks}
    assert Path("model.int4.onnx").exists()
    page = report._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "<script" not in page
    assert "ACCEPT" in page


@pytest.mark.slow
def test_the_page_on_the_library_says_what_happens(lab):
    (lab / "fp32.onnx").rename("model.onnx")
    (lab / "fp32.toml").rename("model.toml")
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text("utf-8")
    names: dict[str, object] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)  # noqa: S102
    seen, report, nearest = (names[name] for name in ("seen", "report", "nearest"))
    assert seen.failed is None
    assert seen.stands_against
    assert (report.outcome, nearest.outcome) == (qdeploy.Outcome.ACCEPT, qdeploy.Outcome.REJECT)
    assert any("attack_success" in reason for reason in nearest.reasons)


def test_it_writes_the_bytes_that_the_command_line_writes(lab):
    assert run("quantize", "fp32.onnx", "--out", "a.onnx", "--seed", 3, "--artifacts", "a") == 0
    qdeploy.quantize("fp32.onnx", "b.onnx", seed=3, artifacts="b", threads=1)
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert run("export", "model.pt", "--out", "c.onnx") == 0
    made = qdeploy.export("model.pt", "d.onnx")
    assert Path("c.onnx").read_bytes() == Path("d.onnx").read_bytes() == made.onnx


def test_settings_are_those_of_the_command_line(lab):
    report = qdeploy.gate(
        "good.onnx", reference="fp32.onnx", policy="demo", device="compact", threads=1,
        triggers=["patch target=0 x=5 y=5 width=2 height=2 color=[1]"], reports=["r.json", "r.md"],
    )  # fmt: skip
    assert report.device["name"] == "compact"
    assert list(report.rates[0].attack_success) == ["patch to class 0"]
    assert Path("r.json").exists()
    assert Path("r.md").exists()


def test_scanning_tells_every_file(lab):
    Path("no.onnx").write_bytes(b"no model")
    good, bad = qdeploy.scan("ort-channel.onnx", "no.onnx")
    assert good.failed is None
    assert not good.stands_against
    assert isinstance(bad.failed, qdeploy.QdeployError)


def test_what_is_asked_wrongly_is_an_error(lab):
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        qdeploy.sanitize("fp32.onnx", "o.onnx", bit=4)
    with pytest.raises(TypeError, match="'reference'"):
        qdeploy.quantize("fp32.onnx", "o.onnx", reference="fp32.onnx")
    with pytest.raises(qdeploy.QdeployError, match="No such file") as failed:
        qdeploy.gate("nothing.onnx", reference="fp32.onnx")
    assert failed.value.exit_code == 2
    with pytest.raises(qdeploy.QdeployError, match="threads=0"):
        qdeploy.quantize("fp32.onnx", "o.onnx", threads=0)
    assert not Path("o.onnx").exists()


@pytest.mark.slow
def test_a_cleaned_model_is_handed_back_and_can_be_opened(lab):
    student = qdeploy.clean(
        "model.pt", "digits-train.npz", "student.pt", sanitizer="kd", epochs=1, image_count=200,
        seed=0,
    )  # fmt: skip
    assert student.path == Path("student.pt")
    assert student.images.images == 200
    cleaned = qdeploy.export("student.pt", "student.onnx")
    assert cleaned.input_shape == qdeploy.export("model.pt", "before.onnx").input_shape


def test_fewer_cores_are_used_while_that_is_asked_for():
    before = cores()
    with limited_to(1):
        assert cores() == 1
    with limited_to(None):
        assert cores() == before


def test_a_float_model_is_handed_back_whole(lab):
    model = qdeploy.export("fp32.onnx", "again.onnx")
    assert isinstance(model, qdeploy.FloatModel)
    assert np.prod(model.input_shape) == 64
