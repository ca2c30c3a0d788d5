"""onnxruntime's own format: written beside the file that it was made from, and measured so."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from qdeploy.judging.rates import RuntimeAgreement
from qdeploy.report.runtime_rows import runtime_text
from qdeploy.runtime.known import RUNTIMES
from qdeploy.runtime.ort_format import as_ort, on_phones, required_operators
from qdeploy.settings.device import DeviceProfile, RuntimeSpec, load_device
from tests.gate_lab import Lab, copied, run
from tests.nets import float_model, residual_net
from tests.test_quantized_file import quantized

SPEC = RuntimeSpec(provider="ort-format")


@pytest.fixture(scope="module")
def int8_file(images) -> bytes:
    made, _, _ = quantized(float_model(residual_net()), images, bits=8, device="x86-avx2")
    return made.onnx


@pytest.fixture
def lab(lab_files: Path, tmp_path: Path) -> Iterator[Lab]:
    with copied(lab_files, tmp_path) as lab:
        yield lab


def test_a_converted_file_answers_as_the_one_it_was_made_from(int8_file, images):
    batch = next(images.batches(16)).pixels
    converted = RUNTIMES["ort-format"].open(int8_file, SPEC)
    cpu = RuntimeSpec(provider="cpu")
    np.testing.assert_array_equal(
        converted.logits(batch), RUNTIMES["cpu"].open(int8_file, cpu).logits(batch)
    )
    kernels = RUNTIMES["ort-format"].kernels(int8_file, SPEC)
    assert kernels["com.microsoft.QLinearConv"] > 3
    assert not any("nchwc" in name for name in kernels)


def test_what_is_asked_is_what_is_written(int8_file):
    """Two conversions differ in their bytes."""
    first = as_ort(int8_file)
    as_ort(residual_net())  # as the float model beside it
    assert as_ort(int8_file) is first


def test_a_reduced_build_is_told_which_operators_the_file_needs(int8_file):
    lines = required_operators(as_ort(int8_file)).decode().splitlines()
    needed = {name for line in lines for name in line.split(";")[2].split(",")}
    kernels = RUNTIMES["ort-format"].kernels(int8_file, SPEC)
    assert needed == {name.split(".")[-1] for name in kernels}
    assert not any("/" in line for line in lines)


def test_what_phones_would_take_is_said_with_what_they_lack(int8_file):
    nnapi, core_ml = on_phones(int8_file)
    assert nnapi.startswith("NNAPI, by onnxruntime's usability checker: yes; ")
    assert "no; " in core_ml
    assert "without ai.onnx:DequantizeLinear, ai.onnx:QuantizeLinear" in core_ml
    (failed,) = on_phones(b"\x08")
    assert failed.startswith("phones: onnxruntime's checker fails")


def test_kernels_are_of_the_graph_that_a_runtime_runs(int8_file):
    unoptimized = RuntimeSpec(provider="cpu", optimizations="off")
    kernels = RUNTIMES["cpu"].kernels(int8_file, unoptimized)
    assert kernels["Conv"] > 3
    assert "0 of" in runtime_text(RuntimeAgreement("cpu", kernels=kernels))
    found = RUNTIMES["cpu"].kernels(int8_file, RuntimeSpec(provider="cpu"))
    integers = sum(n for name, n in found.items() if ".Q" in name)
    said = runtime_text(RuntimeAgreement("cpu", kernels=found))
    assert said == f"{integers} of {sum(found.values())} kernels on integers"


def test_a_device_that_takes_the_format_asks_it():
    mobile = load_device("mobile")
    assert mobile.format == "ort"
    table = mobile.model_dump()
    with pytest.raises(ValidationError, match="goes with a runtime 'ort-format'"):
        DeviceProfile.model_validate({**table, "runtimes": table["runtimes"][:1]})


@pytest.fixture(scope="module")
def shipped(lab_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--format ort` leaves."""
    folder = tmp_path_factory.mktemp("shipped")
    with copied(lab_files, folder):
        options = ("--bits", 8, "--format", "ort", "--out", "out.onnx", "--seed", 0)
        reports = ("--report", "r.json", "--report", "r.html")
        assert run("sanitize", "model.pt", *options, *reports) == 0
    return folder


def test_the_file_is_delivered_in_both_formats_and_judged_in_both(shipped):
    report = json.loads((shipped / "r.json").read_text())
    written = (shipped / "out.ort").read_bytes()
    assert report["converted"]["sha256"] == hashlib.sha256(written).hexdigest()
    assert report["converted"]["size_bytes"] == len(written)
    (asked,) = (r for r in report["runtime_agreement"] if r["runtime"] == "ort-format")
    assert asked["agreement"]["value"] == 100.0
    assert any(check["runtime"] == "ort-format" for check in report["checks"])
    assert any(note.startswith("NNAPI") for note in report["notes"])
    session = ort.InferenceSession(written)
    assert session.get_outputs()[0].shape[1:] == [10]
    config = (shipped / "out.required_operators.config").read_text()
    assert "com.microsoft;1;" in config
    assert report["converted"]["sha256"] in (shipped / "r.html").read_text()


def test_both_files_can_be_attested(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(shipped)
    from cryptography.hazmat.primitives.asymmetric import ed25519

    from tests.test_attest import write_key

    write_key(shipped, "key", ed25519.Ed25519PrivateKey.generate())
    for name in ("out.onnx", "out.ort"):
        assert run("attest", name, "--report", "r.json", "--key", "key.pem") == 0
        assert run("verify", name, "--key", "key.pub.pem") == 0
    assert run("attest", "model.pt", "--report", "r.json", "--key", "key.pem") == 2


@pytest.mark.parametrize("verb", ["scan", "info", "gate", "quantize", "sanitize", "export"])
def test_the_format_of_others_is_refused(shipped, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shipped / "out.ort", "theirs.onnx")  # whatever it is called
    assert run(verb, "theirs.onnx") == 2
    said = capsys.readouterr()
    assert "ORT format, a graph that onnxruntime has rewritten" in said.err
    assert "Traceback" not in said.err


def test_what_an_earlier_run_left_in_the_format_is_not_taken_for_this_ones(lab, tmp_path, capsys):
    for name in ("out.ort", "out.required_operators.config"):
        (tmp_path / name).write_bytes(b"old")
    options = ("--bits", 8, "--format", "ort", "--out", "out.onnx", "--seed", 0)
    assert run("quantize", lab / "model.pt", *options) == 0
    assert (tmp_path / "out.previous.ort").read_bytes() == b"old"
    assert (tmp_path / "out.ort").read_bytes()[4:8] == b"ORTM"


def test_no_file_of_another_format_stays_beside_a_new_one(lab, tmp_path):
    (tmp_path / "out.ort").write_bytes(b"of the last run")
    assert run("quantize", lab / "model.pt", "--bits", 4, "--out", "out.onnx", "--seed", 0) == 0
    assert not (tmp_path / "out.ort").exists()
    assert (tmp_path / "out.previous.ort").exists()


def test_a_scan_of_a_folder_names_them(shipped, tmp_path, capsys):
    shutil.copy(shipped / "out.ort", tmp_path / "theirs.ort")
    assert run("scan", tmp_path) == 2
    assert "ORT format" in capsys.readouterr().err


def test_a_rejected_file_is_so_called_in_both_formats(lab, tmp_path):
    (lab / "strict.toml").write_text(
        'schema_version = 1\nname = "strict-size"\ndescription = "d"\n[budget]\nfile_bytes = 100\n'
        "[validation]\nlatency_runs = 0\n"
    )
    options = ("--bits", 8, "--device", "mobile", "--out", "out.onnx", "--seed", 0)
    assert run("sanitize", lab / "model.pt", *options, "--policy", lab / "strict.toml") == 3
    assert (tmp_path / "out.rejected.ort").exists()
    assert not (tmp_path / "out.ort").exists()
    assert not (tmp_path / "out.onnx").exists()
