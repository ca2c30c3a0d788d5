"""What onnxruntime's own quantizer writes, by all of its options, is its float model's network."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
from onnxruntime.quantization.shape_inference import quant_pre_process

from qdeploy.errors import InputError
from qdeploy.formats.onnx.integer_operators import OPERATORS, to_pairs
from qdeploy.formats.static import findings_in
from qdeploy.graph.io import parse, serialize
from qdeploy.provenance.trace import trace
from qdeploy.runtime.sessions import open_session
from tests.provenance_lab import NETS, by_the_runtime, messages, source, x_of

EXTRA = {
    "ActivationSymmetric": True, "WeightSymmetric": False, "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True, "QuantizeBias": False, "ForceQuantizeNoInputCheck": True,
    "MatMulConstBOnly": False, "CalibMovingAverage": True, "UseQDQContribOps": True,
    "QDQKeepRemovableActivations": True, "QDQDisableWeightAdjustForInt32Bias": True,
    "OpTypesToExcludeOutputQuantization": ["Conv"], "MinimumRealRange": 0.01,
    "EnableSubgraph": True, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
}  # fmt: skip
OPTIONS: dict[str, dict[str, object]] = {
    "defaults": {},
    "operators": {"quant_format": QuantFormat.QOperator},
    "operators of signed": {
        "quant_format": QuantFormat.QOperator, "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
    },
    "reduced range": {"reduce_range": True},
    "entropy": {"calibrate_method": CalibrationMethod.Entropy},
    "percentile": {"calibrate_method": CalibrationMethod.Percentile},
    "16 bits": {"weight_type": QuantType.QInt16, "activation_type": QuantType.QUInt16},
    "signed 16-bit activations": {"activation_type": QuantType.QInt16},
    "int4": {"weight_type": QuantType.QInt4},
    "uint4": {"weight_type": QuantType.QUInt4},
    **{name: {"extra_options": {name: value}} for name, value in EXTRA.items()},
}  # fmt: skip
OPSETS = (13, 17, 21)


def at_opset(data: bytes, opset: int) -> bytes:
    """The test networks' operators are the same in all of `OPSETS`."""
    proto = onnx.ModelProto.FromString(data)
    proto.opset_import[0].version = opset
    proto.ir_version = 8 if opset < 21 else 10
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def pre_processed(data: bytes, folder) -> bytes:
    (folder / "raw.onnx").write_bytes(data)
    quant_pre_process(folder / "raw.onnx", folder / "pre.onnx")
    return (folder / "pre.onnx").read_bytes()


def named(findings) -> set[str]:
    return {finding.rule for finding in findings}


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_the_nearest_rounding_of_the_same_network(option, per_channel, tmp_path):
    """Networks, opsets and pre-processing take turns, so that every option meets several."""
    turn = list(OPTIONS).index(option) + per_channel
    name = ("residual", "mobile", "matmul", "plain")[turn % 4]
    data = at_opset(NETS[name](), OPSETS[turn % 3])
    if turn // 2 % 2:
        data = pre_processed(data, tmp_path)
    file = by_the_runtime(tmp_path, data, per_channel=per_channel, **OPTIONS[option])
    found = trace(file, source(name))
    assert (found.not_compared, messages(found)) == (None, "")
    assert found.layers
    assert found.nearest_rounded
    odd = findings_in(tmp_path / "quantized.onnx")
    assert "error" not in {finding.level for finding in odd}
    assert named(odd) <= {"runtime-operator", "unused-initializer"}


def as_pairs(data: bytes) -> bytes:
    model = parse(data)
    to_pairs(model.graph, "file")
    model.opset_imports.pop("com.microsoft", None)
    return serialize(model)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["residual", "mobile", "matmul", "plain"])
def test_operators_on_integers_compute_what_their_pairs_do(name, signed, per_channel, tmp_path):
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    file = by_the_runtime(
        tmp_path, NETS[name](), quant_format=QuantFormat.QOperator, per_channel=per_channel,
        activation_type=kind, weight_type=QuantType.QInt8, reduce_range=True,
    )  # fmt: skip
    pairs = as_pairs(file)
    onnx.checker.check_model(onnx.ModelProto.FromString(pairs), full_check=True)
    assert OPERATORS.isdisjoint((n.domain, n.op_type) for n in parse(pairs).graph)
    x = x_of(source(name))
    have, want = (open_session(data).logits(x) for data in (pairs, file))
    assert np.abs(have - want).max() < 0.05 * np.abs(want).max()
    assert np.abs(want).max() > 0.1


def operators(folder, name: str = "plain") -> onnx.ModelProto:
    data = by_the_runtime(
        folder, NETS[name](), quant_format=QuantFormat.QOperator, weight_type=QuantType.QInt8
    )
    return onnx.ModelProto.FromString(data)


def change_constant(proto: onnx.ModelProto, name: str, by: int) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[: values.size // 2] += np.array(by, values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def input_of(proto: onnx.ModelProto, op_type: str, index: int) -> str:
    return next(n.input[index] for n in proto.graph.node if n.op_type == op_type)


def test_roundings_in_operators_on_integers_are_seen(tmp_path):
    """Flipped codes are told, and the nearest form of the file holds the quantizer's own."""
    honest = operators(tmp_path)
    flipped = copy.deepcopy(honest)
    change_constant(flipped, input_of(flipped, "QLinearConv", 3), by=1)
    found = trace(flipped.SerializeToString(), source("plain"))
    assert found.flipped > 0.05
    assert not found.nearest_rounded
    assert found.nearest is not None
    assert trace(found.nearest, source("plain")).nearest_rounded


@pytest.mark.parametrize(("op_type", "index"), [("QLinearConv", 8), ("QGemm", 6)])
def test_moved_biases_of_operators_on_integers_are_differences(op_type, index, tmp_path):
    proto = operators(tmp_path)
    change_constant(proto, input_of(proto, op_type, index), by=1_000_000)
    found = trace(proto.SerializeToString(), source("plain"))
    assert "a bias of" in messages(found)


def test_a_pool_of_the_channels_last_is_not_compared(tmp_path):
    proto = operators(tmp_path)
    pool = next(n for n in proto.graph.node if n.op_type == "QLinearGlobalAveragePool")
    del pool.attribute[:]
    pool.attribute.append(onnx.AttributeProto(name="channels_last", type=2, i=1))
    found = trace(proto.SerializeToString(), source("plain"))
    assert found.not_compared is not None
    assert "has its channels last" in found.not_compared


def test_an_operator_of_a_standard_name_is_not_taken_for_the_standards(tmp_path):
    """Not even between integers, where what keeps values is passed over."""
    proto = operators(tmp_path)
    pool = next(n for n in proto.graph.node if n.op_type == "MaxPool")
    pool.domain = "evil.example"
    model = parse(proto.SerializeToString())
    to_pairs(model.graph, "file")
    assert ("evil.example", "MaxPool") in {(n.domain, n.op_type) for n in model.graph}


@pytest.mark.parametrize("lost", [1, 3, 4, 6])
def test_an_operator_that_lacks_inputs_is_one_line(lost, tmp_path):
    proto = operators(tmp_path)
    node = next(n for n in proto.graph.node if n.op_type == "QLinearConv")
    node.input[lost] = ""
    with pytest.raises(InputError, match="lacks its input"):
        as_pairs(proto.SerializeToString())
