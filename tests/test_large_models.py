"""Models that do not fit into a protobuf message: here, what is larger than a few kilobytes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
import pytest

from qdeploy.errors import InputError
from qdeploy.formats.onnx.reading import read_untrusted
from qdeploy.graph.io import initializers
from qdeploy.messages import encoded
from qdeploy.messages.encoded import decode, encode, files_of, from_files, in_two
from qdeploy.runtime.sessions import open_session
from tests import gate_lab
from tests.gate_lab import run


@pytest.fixture
def lab(tmp_path, lab_files, monkeypatch):
    """The lab, whose float model is too large for one message and whose quantized files are not."""
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        sizes = {name: (lab / name).stat().st_size for name in ("fp32.onnx", "good.onnx")}
        assert sizes["good.onnx"] < 0.5 * sizes["fp32.onnx"]
        monkeypatch.setattr(encoded, "LARGEST_MESSAGE_BYTES", sizes["fp32.onnx"] // 2)
        yield lab


@pytest.fixture
def in_parts(lab):
    """The float model as it is exported then: a message and its data, with its card."""
    assert run("export", lab / "fp32.onnx", "--out", lab / "large.onnx") == 0
    (lab / "large.toml").write_text(lab.card)
    return lab / "large.onnx"


def test_a_large_model_is_written_as_a_message_and_its_data(lab, in_parts):
    beside = lab / "large.onnx.data"
    assert beside.stat().st_size > 10 * in_parts.stat().st_size
    onnx.checker.check_model(str(in_parts), full_check=True)
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    want, got = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
        for path in (lab / "fp32.onnx", in_parts)
    )
    np.testing.assert_array_equal(got, want)


def test_the_bytes_of_a_large_model_are_the_model(lab):
    small = onnx.load(lab / "fp32.onnx")
    data = encode(small)
    assert in_two(data) is not None
    assert in_two(small.SerializeToString()) is None
    assert decode(data) == small
    assert data == encode(small)
    assert from_files(*reversed(files_of(data, "any.onnx").values())) == data
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    want = open_session(small.SerializeToString()).logits(x)
    np.testing.assert_array_equal(open_session(data).logits(x), want)
    held = initializers(small.SerializeToString())
    for name, values in initializers(data).items():
        np.testing.assert_array_equal(values, held[name])


def test_a_file_is_not_read_as_the_bytes_are_kept(lab):
    """They name a block that nothing has checked."""
    (lab / "hostile.onnx").write_bytes(encode(onnx.load(lab / "fp32.onnx")))
    with pytest.raises(InputError, match="not an ONNX file"):
        read_untrusted(lab / "hostile.onnx")


@pytest.mark.parametrize("bits", [8, 4])
def test_its_integers_are_those_of_the_same_model_in_one_file(lab, in_parts, bits, monkeypatch):
    command = ("--bits", bits, "--seed", 1, "--artifacts", lab / "runs")
    assert run("quantize", in_parts, "--out", lab / "from-parts.onnx", *command) == 0
    monkeypatch.undo()
    monkeypatch.chdir(lab.folder)
    assert run("quantize", lab / "fp32.onnx", "--out", lab / "from-one.onnx", *command) == 0
    one, parts = (initializers((lab / f"from-{n}.onnx").read_bytes()) for n in ("one", "parts"))
    assert one.keys() == parts.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, parts[name])


def test_it_goes_through_every_verb(lab, in_parts, capsys):
    places = ("--artifacts", lab / "runs")
    assert run("info", in_parts) == 0
    assert run("scan", in_parts) in {0, 3}
    assert run("sanitize", in_parts, "--out", lab / "out.onnx", "--policy", "demo", "--seed", 1,
               "--report", lab / "out.json", *places) == 0  # fmt: skip
    assert run("gate", lab / "out.onnx", "--reference", in_parts, "--policy", "demo",
               "--made-by", lab / "out.json", *places) == 0  # fmt: skip
    assert "ACCEPT" in capsys.readouterr().out
    variants = {m["variant"] for m in json.loads((lab / "out.json").read_text())["measurements"]}
    assert {"source", "result"} <= variants or {"fp32", "result"} <= variants
    kept = [path.parent for path in (lab / "runs").rglob("fp32.onnx.data")]
    assert kept
    assert all(onnx.load(folder / "fp32.onnx").graph.initializer for folder in kept)


def test_a_quantized_model_that_no_file_holds_is_one_line(lab, in_parts, capsys, monkeypatch):
    from qdeploy.quantization import emit

    monkeypatch.setattr(emit, "LARGEST_MESSAGE_BYTES", 1000)
    assert run("quantize", in_parts, "--out", lab / "out.onnx", "--artifacts", lab / "runs") == 2
    assert "bytes when it is quantized" in capsys.readouterr().err
    assert not (lab / "out.onnx").exists()


@pytest.mark.parametrize("opset", [17, 22])
def test_a_large_model_of_another_opset_is_converted(lab, in_parts, opset):
    proto = onnx.version_converter.convert_version(onnx.load(lab / "fp32.onnx"), opset)
    onnx.save(proto, lab / "old.onnx", save_as_external_data=True, location="old.bin")
    assert encoded.is_large(onnx.load(lab / "old.onnx"))
    (lab / "old.toml").write_text(lab.card)
    assert run("export", lab / "old.onnx", "--out", lab / "new.onnx") == 0
    found = onnx.load(lab / "new.onnx")
    assert found.opset_import[0].version == 21
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    want = open_session((lab / "fp32.onnx").read_bytes(), optimizations="off").logits(x)
    got = open_session(encode(found), optimizations="off").logits(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
