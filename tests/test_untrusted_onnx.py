"""ONNX files from strangers: each lie is found before anything runs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from qdeploy.errors import InputError, QdeployError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.nodes import operators
from qdeploy.formats.onnx.reading import read_untrusted, refuse_quantized
from qdeploy.formats.opening import load
from qdeploy.graph.io import cut_to, initializers, parse, serialize
from tests.nets import Net, residual_net


@pytest.fixture
def proto() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(residual_net())


@pytest.fixture
def save(tmp_path):
    def save(proto: onnx.ModelProto) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return save


def test_an_honest_model_passes(proto, save):
    assert read_untrusted(save(proto)) == proto


def claim_more_values(proto):
    proto.graph.initializer[0].dims[0] = 2**12


def claim_more_floats(proto):
    tensor = proto.graph.initializer[0]
    values = numpy_helper.to_array(tensor).ravel()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values[:-1])


def negative_shape(proto):
    proto.graph.initializer[0].dims[0] = -1


def nan_weight(proto):
    tensor = proto.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.ravel()[:3] = [np.nan, np.inf, -np.inf]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def custom_operator(proto):
    proto.graph.node[1].domain = "com.evil"
    proto.opset_import.add(domain="com.evil", version=1)


def control_flow(proto):
    node = proto.graph.node.add(op_type="If", input=["v0"], output=["z"])
    for name in ("then_branch", "else_branch"):
        node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.name = name


def sparse(proto):
    tensor = proto.graph.sparse_initializer.add(dims=[4])
    tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))


def dangling_input(proto):
    proto.graph.node[2].input[0] = "nowhere"


def unknown_operator(proto):
    proto.graph.node[1].op_type = "Frobnicate"


def external(location: str, offset: str = "0", length: str = "4"):
    def change(proto):
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (claim_more_values, "holds 864 of"),
        (claim_more_floats, "holds 215 of 216 values"),
        (negative_shape, "has shape (-1,"),
        (nan_weight, "3 of 216 values that are NaN or infinite"),
        (custom_operator, "com.evil.Relu is not a standard"),
        (control_flow, "control flow (If)"),
        (sparse, "sparse"),
        (dangling_input, "ONNX's own check"),
        (unknown_operator, "ONNX's own check"),
        (external("../../etc/passwd"), "outside of its folder"),
        (external("/etc/passwd"), "outside of its folder"),
        (external(""), "outside of its folder"),
        (external("weights.bin"), "weights.bin"),
        (external("model.onnx", offset="100", length="99999999"), "claims bytes 100 to 100000099"),
        (external("model.onnx", offset="-4"), "claims bytes -4"),
        (external("model.onnx", offset="many"), "model.onnx"),
        (external("model.onnx", length="8"), "of 864 bytes claims 8"),
    ],
)
def test_a_lie_is_found(proto, save, change, complaint):
    change(proto)
    with pytest.raises(InputError) as error:
        read_untrusted(save(proto))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_external_data_in_the_models_own_folder_is_read(proto, save, tmp_path):
    tensor = proto.graph.initializer[0]
    want = numpy_helper.to_array(tensor)
    (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
    external("weights.bin", length=str(len(tensor.raw_data)))(proto)
    read = read_untrusted(save(proto))
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[0]), want)


def test_a_link_out_of_the_folder_is_not_followed(proto, save, tmp_path):
    outside = tmp_path.parent / "outside.bin"
    outside.write_bytes(b"\0" * 864)
    (tmp_path / "weights.bin").symlink_to(outside)
    external("weights.bin", length="864")(proto)
    with pytest.raises(InputError, match="outside of its folder"):
        read_untrusted(save(proto))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"PK\x03\x04", b"hello world, this is text", b"\x80\x02}q\x00.", b"\xff" * 100],
    ids=["empty", "a zero", "zip", "text", "pickle", "noise"],
)
def test_what_is_no_onnx_file_is_called_that(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model .*model\.onnx"):
        load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_called_that(tmp_path, share):
    data = residual_net()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"truncated|no graph"):
        load(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(tmp_path_factory, data):
    """Damage anywhere either goes unnoticed or is an error of ours."""
    model = bytearray(residual_net())
    for _ in range(data.draw(st.integers(1, 6))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "model.onnx"
    path.write_bytes(model)
    with contextlib.suppress(QdeployError):
        export(load(path))


def test_a_quantized_model_is_not_rounded_again(proto):
    proto.graph.node[0].op_type = "QuantizeLinear"
    with pytest.raises(InputError, match="already quantized") as error:
        refuse_quantized(proto, "model.onnx")
    assert "qdeploy gate" in (error.value.hint or "")


def test_writing_what_was_read_gives_the_same_bytes():
    data = residual_net()
    assert serialize(parse(data)) == serialize(parse(serialize(parse(data))))


def test_cutting_leaves_only_what_an_output_needs():
    net = Net()
    a = net.relu(net.conv(net.x, 4, 3, 3, 3, pads=[1, 1, 1, 1]))
    b = net.conv(a, 4, 4, 3, 3, pads=[1, 1, 1, 1])
    data = net.model(net.head(b, 4))
    cut = cut_to(data, [a.name])
    assert operators(cut) == ("Conv", "Relu")
    assert len(initializers(cut)) == 2
