"""ONNX files looked at without running them: one hostile file for each rule, and clean ones."""

from __future__ import annotations

import contextlib
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from qdeploy.core.grids import quantize
from qdeploy.core.weight_grids import GRIDS
from qdeploy.data import Images
from qdeploy.errors import InputError
from qdeploy.formats.onnx.codes import integer_weights
from qdeploy.formats.onnx.reading import check
from qdeploy.formats.static import MOST_PER_RULE, RULES, findings_in
from qdeploy.values import Finding
from tests.nets import Net, residual_net
from tests.test_quantized_file import quantized

Change = Callable[[onnx.ModelProto], None]


def text_model(
    body: str = "y = MatMul (x, w)",
    *,
    inputs: str = "float[N,4] x",
    outputs: str = "float[N,3] y",
    constants: str = "",
    functions: str = "",
) -> onnx.ModelProto:
    numbers = ", ".join(str(0.5 + i) for i in range(12))
    return onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.evil" : 1, "com.microsoft" : 1]>\n'
        f"net ({inputs}) => ({outputs}) <float[4,3] w = {{{numbers}}}{constants}> {{ {body} }}\n"
        f"{functions}"
    )


def changed(change: Change, body: str = "y = MatMul (x, w)") -> onnx.ModelProto:
    proto = text_model(body)
    change(proto)
    return proto


def put(proto: onnx.ModelProto, name: str, values: np.ndarray) -> TensorProto:
    tensor = next((t for t in proto.graph.initializer if t.name == name), None)
    tensor = proto.graph.initializer.add() if tensor is None else tensor
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return tensor


def weight(values: np.ndarray) -> Change:
    return lambda proto: put(proto, "w", values) and None


def claims_more(proto):
    proto.graph.initializer[0].dims[0] = 2**40


def unreadable(proto):
    proto.graph.initializer[0].data_type = 99


def twice(proto):
    proto.graph.initializer.append(proto.graph.initializer[0])


def sparse(proto):
    tensor = proto.graph.sparse_initializer.add(dims=[4])
    tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))


def infinite_bound(proto):
    node = onnx.NodeProto(op_type="Constant", output=["b"])
    bound = numpy_helper.from_array(np.array(np.inf, np.float32))
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(bound)
    proto.graph.node.insert(0, node)


def text_tensor(proto):
    put(proto, "s", np.array(["a", "b"], dtype=object))


def metadata(proto):
    proto.metadata_props.add(key="k", value="x" * 70_000)


def node_text(proto):
    proto.graph.node[0].doc_string = "x" * 70_000


def quantized_weight(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None
) -> onnx.ModelProto:
    """A matrix product by `codes`, one channel per row."""
    proto = text_model(
        "d = DequantizeLinear <axis=0> (q, scale, zero)  y = Gemm <transB=1> (x, d)",
        inputs=f"float[N,{codes.shape[1]}] x",
        outputs=f"float[N,{codes.shape[0]}] y",
    )
    del proto.graph.initializer[:]
    put(proto, "q", codes.astype(np.int8))
    put(proto, "scale", scale.astype(np.float32))
    put(proto, "zero", np.zeros_like(scale, np.int8) if zero_point is None else zero_point)
    return proto


def honest_codes(channels: int = 16, values: int = 50, max_code: int = 127) -> np.ndarray:
    codes = np.random.default_rng(0).integers(-max_code // 2, max_code // 2, (channels, values))
    codes[::2, 0], codes[1::2, 0] = max_code, -max_code
    return codes


ONES = np.full(16, 0.01)


def with_code(code: int, max_code: int = 127) -> onnx.ModelProto:
    codes = honest_codes(max_code=max_code)
    codes[3, 7] = code
    return quantized_weight(codes, ONES)


def narrow_channel() -> onnx.ModelProto:
    codes = honest_codes()
    codes[5] = codes[5] // 20
    return quantized_weight(codes, ONES)


def far_scale() -> onnx.ModelProto:
    codes, scale = honest_codes(), ONES.copy()
    codes[5] = codes[5] // 3
    scale[5] *= 200
    return quantized_weight(codes, scale)


BRANCH = (
    "y = If (c) <then_branch = g () => (float[N,3] a) { a = MatMul (x, w) },"
    " else_branch = h () => (float[N,3] b) { b = MatMul (x, w) }>"
)
FUNCTION = '<domain: "{0}", opset_import: ["" : 21]> {1} (a) => (b) {{ {2} }}'
THRESHOLD = "m = MatMul (x, w) c = Greater (m, t) y = Where (c, m, t)"
SCALAR = ", float t = {0.5}"
EMPTY_ARCHIVE = "PK\x05\x06" + "\x00" * 18
TINY = np.where(np.arange(192).reshape(4, 48) % 2, 1e-40, 0.5).astype(np.float32)

HOSTILE = [
    ("custom-operator", "error", text_model("y = com.evil.Run (x)")),
    ("custom-operator", "error", text_model("y = com.microsoft.SampleOp (x)")),
    ("custom-operator", "error", text_model(
        "y = com.evil.Run (x)", functions=FUNCTION.format("com.evil", "Other", "b = Neg (a)"))),
    ("custom-operator", "error", text_model(
        "y = com.evil.F (x)", functions=FUNCTION.format("com.evil", "F", "b = com.evil.G (a)"))),
    ("shadowed-operator", "error", text_model(
        "y = Relu (x)", functions=FUNCTION.format("", "Relu", "b = Neg (a)"))),
    ("control-flow", "error", text_model(BRANCH, constants=", bool c = {1}")),
    ("control-flow", "error", text_model("s = SequenceMap (x) y = Neg (x)")),
    ("sparse-initializer", "error", changed(sparse)),
    ("false-claim", "error", changed(claims_more)),
    ("false-claim", "error", changed(unreadable)),
    ("not-finite", "error", changed(weight(np.full((4, 3), np.nan, np.float32)))),
    ("duplicate-initializer", "error", changed(twice)),
    ("training-info", "error", changed(lambda proto: proto.training_info.add() and None)),
    ("invalid-onnx", "error", text_model("y = MatMul (x, nowhere)")),
    ("randomness", "error", text_model("r = RandomNormalLike (x) y = MatMul (r, w)")),
    ("randomness", "error", text_model("r = Bernoulli (x) y = MatMul (r, w)")),
    ("randomness", "error", text_model(
        "d = Dropout (x, p, t) y = MatMul (d, w)",
        constants=", float p = {0.5}, bool t = {1}")),
    ("bad-scale", "error", quantized_weight(honest_codes(), ONES * 0)),
    ("bad-scale", "error", quantized_weight(honest_codes(), np.where(ONES, np.nan, 0))),
    ("data-dependent-choice", "warning", text_model(THRESHOLD, constants=SCALAR)),
    ("data-dependent-choice", "warning", text_model(
        "m = MatMul (x, w) c = Cast <to=9> (m) f = Cast <to=1> (c) y = Mul (m, f)")),
    ("data-dependent-choice", "warning", text_model(
        "i = ArgMax <axis=1, keepdims=0> (x) y = Gather (w, i)")),
    ("data-dependent-choice", "warning", text_model(
        "m = MatMul (x, w) y = com.evil.F (m)",
        functions=FUNCTION.format(
            "com.evil", "F", "z = Sub (a, a) c = Less (a, z) b = Where (c, a, z)"))),
    ("unused-initializer", "warning", text_model(constants=", float[2] spare = {1, 2}")),
    ("overridable-initializer", "warning", text_model(inputs="float[N,4] x, float[4,3] w")),
    ("large-metadata", "warning", changed(metadata)),
    ("large-metadata", "warning", changed(node_text)),
    ("string-tensor", "warning", changed(text_tensor)),
    ("unprintable-name", "warning", changed(lambda p: put(p, "a\x1b[2J\n", TINY[:, :2]) and None)),
    ("half-precision", "warning", changed(weight(np.ones((4, 3), np.float16)))),
    ("odd-type", "warning", changed(lambda p: put(p, "d", np.ones(3)) and None)),
    ("odd-type", "warning", changed(lambda p: put(p, "c", np.ones(3, np.complex64)) and None)),
    ("denormals", "warning", changed(lambda p: put(p, "tiny", TINY) and None)),
    ("several-inputs", "warning", text_model(
        "a = Add (x, z) y = MatMul (a, w)", inputs="float[N,4] x, float[N,4] z")),
    ("several-outputs", "warning", text_model(
        "y = MatMul (x, w) z = Neg (y)", outputs="float[N,3] y, float[N,3] z")),
    ("code-off-grid", "warning", with_code(-128)),
    ("code-off-grid", "warning", with_code(-8, max_code=7)),
    ("code-off-grid", "warning", with_code(100, max_code=7)),
    ("mixed-zero-points", "warning", quantized_weight(
        honest_codes(), ONES, np.eye(1, 16, 3, dtype=np.int8)[0])),
    ("scale-outlier", "warning", narrow_channel()),
    ("scale-outlier", "warning", far_scale()),
]  # fmt: skip


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def against(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "note"]


@pytest.mark.parametrize(
    ("rule", "level", "proto"),
    [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(HOSTILE)],
)
def test_every_rule_finds_what_it_is_for(tmp_path, rule, level, proto):
    found = [finding for finding in findings_in(save(proto, tmp_path)) if finding.rule == rule]
    assert found
    assert {finding.level for finding in found} == {level}
    assert all(finding.message and "\n" not in finding.message for finding in found)
    assert rule in RULES


@pytest.mark.parametrize("proto", [case[2] for case in HOSTILE if case[1] == "error"])
def test_the_loader_refuses_every_error(proto):
    with pytest.raises(InputError, match=r"^model net\.onnx: "):
        check(proto, "net.onnx")


def test_an_operator_of_onnxruntime_is_called_that(tmp_path):
    (found,) = findings_in(save(text_model("y = com.microsoft.SampleOp (x)"), tmp_path))[:1]
    assert found.message.startswith(
        "operator com.microsoft.SampleOp is not a standard ONNX operator"
    )
    assert "onnxruntime has it" in found.message


CLEAN = {
    "a matrix product": text_model(),
    "a mask that is constant": text_model(
        "c = Greater (t, u) m = MatMul (x, w) y = Where (c, m, t)",
        constants=SCALAR + ", float u = {1}",
    ),
    "a choice by the input's shape alone": text_model(
        "s = Shape (x) e = Equal (s, o) k = Where (e, s, s) r = Reshape (x, k) y = MatMul (r, w)",
        constants=", int64[2] o = {1, 1}",
    ),
    "a choice that nothing uses": text_model("c = IsNaN (x) y = MatMul (x, w)"),
    "dropout that was switched off": text_model(
        "d = Dropout (x, p, t) y = MatMul (d, w)", constants=", float p = {0.5}, bool t = {0}"
    ),
    "an infinite bound": changed(infinite_bound, "m = MatMul (x, w) y = Min (m, b)"),
    "a local function": text_model(
        "m = MatMul (x, w) y = com.evil.F (m)",
        functions=FUNCTION.format("com.evil", "F", "b = Relu (a)"),
    ),
    "codes per channel": quantized_weight(honest_codes(), ONES),
    "4 bits in a byte": quantized_weight(honest_codes(max_code=7), ONES),
    "a channel of zeros": quantized_weight(honest_codes() * (np.arange(16) != 3)[:, None], ONES),
    "a rounding that stayed below the end in all channels but one": with_code(127, max_code=126),
    "a channel of the smallest scale there is": quantized_weight(
        honest_codes() // np.where(np.arange(16) == 5, 20, 1)[:, None],
        np.where(np.arange(16) == 5, np.finfo(np.float32).tiny, 0.01),
    ),
    "a few denormals": changed(weight(np.where(np.eye(4, 3), 1e-40, 1).astype(np.float32))),
    "a reduced range": quantized_weight(honest_codes(max_code=64), ONES),
}  # fmt: skip


@pytest.mark.parametrize("proto", CLEAN.values(), ids=CLEAN)
def test_nothing_stands_against_an_honest_file(tmp_path, proto):
    assert against(findings_in(save(proto, tmp_path))) == []


class Batches(CalibrationDataReader):
    def __init__(self) -> None:
        values = np.random.default_rng(0).normal(size=(3, 2, 3, 8, 8)).astype(np.float32)
        self.batches = iter([{"image": batch} for batch in values])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def faint_channel() -> bytes:
    """A channel whose weights are tiny beside its bias: quantizers widen its scale for the bias."""
    net = Net()
    weight = net.rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    weight[2] *= 5e-8
    bias = net.constant(np.ones(16, np.float32))
    return net.model(net.head(net.relu(net.node("Conv", net.x, net.constant(weight), bias)), 16))


@pytest.mark.parametrize(
    "data", [residual_net(), faint_channel()], ids=["residual", "faint channel"]
)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("weights", [QuantType.QInt8, QuantType.QUInt8], ids=lambda t: t.name)
def test_what_onnxruntime_quantizes_is_clean(tmp_path, data, per_channel, weights, monkeypatch):
    monkeypatch.setattr(logging.root, "disabled", True)
    (tmp_path / "float.onnx").write_bytes(data)
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "model.onnx", Batches(), weight_type=weights,
        quant_format=QuantFormat.QDQ, per_channel=per_channel, activation_type=QuantType.QUInt8,
    )  # fmt: skip
    assert against(findings_in(tmp_path / "model.onnx")) == []


@pytest.mark.parametrize(("bits", "device"), [(4, "x86-vnni"), (4, "compact"), (8, "x86-avx2")])
def test_what_this_program_makes_is_clean(net, images: Images, tmp_path, bits, device):
    (tmp_path / "float.onnx").write_bytes(net.onnx)
    result, _, _ = quantized(net, images, bits=bits, device=device)
    (tmp_path / "model.onnx").write_bytes(result.onnx)
    for name in ("float.onnx", "model.onnx"):
        assert against(findings_in(tmp_path / name)) == []


@pytest.mark.parametrize("grid", ["absmax", "half", "mse"])
@pytest.mark.parametrize("max_code", [7, 127])
def test_no_usual_grid_has_codes_off_it(tmp_path, grid, max_code):
    """In one of them channels end at -128 or at 127, whichever side reaches further."""
    values = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    values *= np.sign(values[np.arange(64), np.abs(values).argmax(axis=1)])[:, None]
    values[::4] *= -1
    made = GRIDS[grid](values, axis=0, max_code=max_code)
    proto = quantized_weight(quantize(values, made), made.scale)
    assert against(findings_in(save(proto, tmp_path))) == []


def test_a_grid_of_blocks_is_read_block_by_block(tmp_path):
    """One block of 25 codes does not use its scale."""
    codes = honest_codes(values=50)
    codes[:, 25] = 127
    proto = quantized_weight(codes, np.ones(32))
    for name in ("scale", "zero"):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        del tensor.dims[:]
        tensor.dims.extend([16, 2])
    proto.graph.node[0].attribute[0].i = 1
    proto.graph.node[0].attribute.add(name="block_size", i=25, type=onnx.AttributeProto.INT)
    assert against(findings_in(save(proto, tmp_path))) == []
    codes[4, 25:] = 3
    put(proto, "q", codes.astype(np.int8))
    (found,) = findings_in(save(proto, tmp_path))
    assert (found.rule, found.where) == ("scale-outlier", "q")
    assert "channel 9 reaches 3 of 127" in found.message


def small_matrices(op_type: str) -> onnx.ModelProto:
    """A product of twelve matrices with one scale each, and `op_type` with one more at -128."""
    steps = [f"d{i} = DequantizeLinear (q{i}, s) x{i + 1} = MatMul (x{i}, d{i})" for i in range(12)]
    last = f"d12 = DequantizeLinear (q12, s) y = {op_type} (x12, d12)"
    proto = text_model(" ".join([*steps, last]), inputs="float[4,4] x0", outputs="float[4,4] y")
    del proto.graph.initializer[:]
    put(proto, "s", np.array(0.01, np.float32))
    for i in range(13):
        codes = honest_codes(4, 4)
        codes[::2] = codes[::2] // 2
        codes[0, 0] = -128 if i == 12 else 0
        put(proto, f"q{i}", codes.astype(np.int8))
    return proto


def test_weights_of_one_scale_are_judged_together_and_summands_are_no_weights(tmp_path):
    """A constant summand has the grid of an activation, which may well end at -128."""
    (found,) = findings_in(save(small_matrices("MatMul"), tmp_path))
    assert (found.rule, found.where) == ("code-off-grid", "q12")
    assert findings_in(save(small_matrices("Add"), tmp_path)) == ()


def test_a_weight_that_many_read_is_held_once():
    """Fifty readers of 8 MB took 1.8 GB while all rows were kept."""
    readers = " ".join(f"d{i} = DequantizeLinear (q, s)" for i in range(50))
    proto = text_model(f"{readers} y = MatMul (x, w)")
    put(proto, "s", np.array(0.01, np.float32))
    put(proto, "q", np.full((8, 1 << 20), 127, np.int8))
    tracemalloc.start()
    assert not list(integer_weights(proto))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 23


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(tmp_path, data):
    """Damage anywhere is a finding, an error of ours, or goes unnoticed."""
    model = bytearray(with_code(5).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 120) | st.integers(0, len(model) - 1))
        model[at] = data.draw(st.integers(0, 255))
    (tmp_path / "model.onnx").write_bytes(model)
    with contextlib.suppress(InputError):
        findings_in(tmp_path / "model.onnx")


def external(proto: onnx.ModelProto, *places: tuple[str, int, int]) -> onnx.ModelProto:
    """The tensors that are put in other files, a place for each."""
    for i, (location, offset, length) in enumerate(places):
        tensor = put(proto, f"w{i}" if i else "w", np.ones((4, 3), np.float32))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return proto


@pytest.mark.parametrize(
    ("places", "rule"),
    [
        ([("/etc/passwd", 0, 48)], "external-path"),
        ([("../out.bin", 0, 48)], "external-path"),
        ([("{folder}/w.bin", 0, 48)], "external-path"),
        ([("link.bin", 0, 48)], "external-path"),
        ([("circle", 0, 48)], "external-path"),
        ([("a\0b", 0, 48)], "external-path"),
        ([(".", 0, 48)], "external-path"),
        ([("w.bin", 64, 48)], "external-range"),
        ([("w.bin", -8, 48)], "external-range"),
        ([("sparse.bin", 0, 2**31)], "external-range"),
        ([("w.bin", 0, 48), ("w.bin", 24, 48)], "external-overlap"),
    ],
)
def test_external_data_is_judged_before_it_is_read(tmp_path, places, rule):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("folder/w.bin", "out.bin"):
        (tmp_path / name).write_bytes(np.ones(18, np.float32).tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "out.bin")
    (folder / "circle").symlink_to(folder / "circle")
    with (folder / "sparse.bin").open("wb") as file:
        file.truncate(2**31)
    placed = [(name.format(folder=folder), *span) for name, *span in places]
    findings = findings_in(save(external(text_model(), *placed), folder))
    assert [f.rule for f in findings if f.rule.startswith("external")] == [rule]


def test_bytes_that_many_tensors_share_are_not_read_for_each(tmp_path):
    """A file of 1 GiB would be 3 in memory."""
    proto = external(text_model(), *[("sparse.bin", 0, 1 << 30)] * 3)
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.dims[:] = [1 << 28]
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(1 << 30)
    found = findings_in(save(proto, tmp_path))
    assert "external-range" in {f.rule for f in found if f.level == "error"}


def test_external_data_that_is_what_it_claims_is_clean_and_looked_at(tmp_path):
    proto = external(text_model(), ("w.bin", 0, 48))
    (tmp_path / "w.bin").write_bytes(np.ones(12, np.float32).tobytes())
    assert findings_in(save(proto, tmp_path)) == ()
    (tmp_path / "w.bin").write_bytes(np.full(12, np.nan, np.float32).tobytes())
    assert [finding.rule for finding in findings_in(save(proto, tmp_path))] == ["not-finite"]


def test_constants_that_had_to_be_inputs_are_noted_once(tmp_path):
    proto = text_model(inputs="float[N,4] x, float[4,3] w")
    proto.ir_version = 3
    (note,) = findings_in(save(proto, tmp_path))
    assert (note.rule, note.level) == ("overridable-initializer", "note")


def test_names_are_kept_as_data_and_quoted_in_messages(tmp_path):
    name = "a\x1b[2J\nb"
    (found,) = [
        f
        for f in findings_in(save(changed(lambda p: put(p, name, TINY)), tmp_path))
        if f.rule == "unprintable-name"
    ]
    assert found.where == name
    assert repr(name) in found.message


def test_a_file_that_is_wrong_in_a_thousand_places_gives_a_short_list(tmp_path):
    proto = text_model()
    for i in range(1000):
        put(proto, f"spare{i}", np.ones(2, np.float32))
    findings = findings_in(save(proto, tmp_path))
    assert len(findings) == MOST_PER_RULE + 1
    assert findings[-1].message == f"and {1000 - MOST_PER_RULE} more like these"


def test_errors_come_first(tmp_path):
    findings = findings_in(save(changed(twice, "u = Neg (x) y = MatMul (x, w)"), tmp_path))
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels)
    assert levels[0] == "error"


BYTES = text_model().SerializeToString()


@pytest.mark.parametrize(
    "data", [b"", b"text", BYTES[:-20], BYTES.replace(b"MatMul", b"Mat\xfful")]
)
def test_what_is_no_model_is_an_error_and_no_finding(tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx"):
        findings_in(tmp_path / "model.onnx")


def test_missing_files_folders_and_files_too_large_are_errors(tmp_path):
    with (tmp_path / "large.onnx").open("wb") as file:
        file.write(b"\x08\x0a")
        file.truncate(2**31)
    for path in (tmp_path / "gone.onnx", tmp_path, tmp_path / "large.onnx"):
        with pytest.raises(InputError):
            findings_in(path)


def test_an_onnx_file_with_an_archive_behind_it_is_both(tmp_path):
    path = save(changed(lambda p: setattr(p, "doc_string", EMPTY_ARCHIVE)), tmp_path)
    assert [finding.rule for finding in findings_in(path)] == ["hidden-bytes"]
