"""The profile is that of the machine, and one that does not fit it is said."""

from __future__ import annotations

import json

import pytest

from qdeploy.errors import UsageError
from qdeploy.graph.io import identity
from qdeploy.runtime.known import runtime_of
from qdeploy.settings import device as devices
from qdeploy.settings.device import AUTO, RuntimeSpec, load_device, misfit
from qdeploy.settings.policy import Policy
from qdeploy.settings.recipe import load_recipe
from tests import gate_lab
from tests.gate_lab import run

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})
AVX2 = frozenset({"avx2", "fma"})


@pytest.fixture
def on_avx2(monkeypatch):
    monkeypatch.setattr(devices, "processor_flags", lambda: AVX2)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize(
    ("flags", "machine"),
    [(VNNI, "x86_64"), (AVX2 | {"avx_vnni"}, "AMD64"), (AVX2, "x86_64"), (frozenset(), "aarch64")],
)
def test_the_default_profile_is_the_same_on_every_machine(monkeypatch, flags, machine):
    monkeypatch.setattr(devices, "processor_flags", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert load_device(AUTO) == load_device("x86-avx2")
    assert load_recipe("int8").device == AUTO
    assert Policy.model_fields["device"].default == AUTO
    assert misfit(load_device(AUTO)) is None


@pytest.mark.parametrize(
    ("name", "fits"), [("x86-vnni", False), ("compact", False), ("cuda", False), ("x86-avx2", True)]
)
def test_a_profile_that_saturates_here_does_not_fit(on_avx2, name, fits):
    found = misfit(load_device(name))
    assert (found is None) is fits
    assert found is None or f"device {name}: " in found
    assert found is None or "--device x86-avx2" in found


@pytest.mark.slow
def test_what_does_not_fit_is_said_wherever_it_is_used(on_avx2, lab_files, tmp_path, capsys):
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        told = "device x86-vnni: this processor adds pairs of 8-bit products in 16 bits"
        foreign = ("--device", "x86-vnni")
        out = ("--out", "out.onnx")
        assert run("sanitize", "model.pt", *out, "--dry-run", *foreign) == 0
        assert told in " ".join(capsys.readouterr().out.split())
        assert run("quantize", "model.pt", *out, "--rounding", "nearest", *foreign) == 0
        assert told in " ".join(capsys.readouterr().out.split())
        gate = ("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo")
        assert run(*gate, *foreign, "--report", "r.json") == 0
        assert told in " ".join(capsys.readouterr().out.split())
        report = json.loads((lab / "r.json").read_text("utf-8"))
        assert any(told in note for note in report["notes"])
        assert run(*gate, "--report", "own.json") == 0
        own = json.loads((lab / "own.json").read_text("utf-8"))
        assert own["device"]["name"] == "x86-avx2"
        assert not any("this processor" in note for note in own["notes"])


def test_runtimes_are_told_apart_by_their_options():
    boards = [RuntimeSpec(provider="far", options={"address": a}) for a in ("a:1", "b:1")]
    assert [board.label for board in boards] == ["far a:1", "far b:1"]


def test_an_option_that_a_runtime_does_not_have_is_an_error():
    spec = RuntimeSpec(provider="cpu", options={"address": "a:1"})
    with pytest.raises(UsageError, match="runtime cpu takes no options: address"):
        runtime_of(spec).open(identity(), spec)


def test_a_runtime_that_nobody_has_written_is_an_error_with_those_there_are():
    with pytest.raises(UsageError, match="there is no runtime 'tpu'") as failed:
        runtime_of(RuntimeSpec(provider="tpu"))
    assert (
        failed.value.hint
        == "have cpu, cuda, ort-format, openvino, reference, avx2-emulated, ssh, web"
    )
