from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdeploy.errors import InputError, UsageError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.nodes import operators
from qdeploy.formats.onnx.reading import check
from qdeploy.graph.io import initializers, parse
from qdeploy.graph.simplify import simplify
from qdeploy.graph.sites import find_sites
from qdeploy.runtime.sessions import open_session
from qdeploy.values import Loaded, Origin, Stated
from tests.nets import Net, float_model, residual_net


def batchnorm(net: Net, x, channels: int, name: str = "bn"):
    scale, shift, mean = (
        net.weight(channels, name=f"{name}.{part}") for part in ("weight", "b", "m")
    )
    variance = net.constant(net.rng.uniform(0.5, 2, channels).astype(np.float32))
    return net.node("BatchNormalization", x, scale, shift, mean, variance)


def same_outputs(data: bytes, prepared: bytes) -> None:
    x = np.random.default_rng(5).normal(size=(3, 3, 8, 8)).astype(np.float32)
    want, got = open_session(data).logits(x), open_session(prepared).logits(x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_batchnorm_behind_a_convolution_is_folded_into_it():
    net = Net()
    x = net.relu(batchnorm(net, net.conv(net.x, 4, 3, 3, 3), 4))
    data = net.model(net.head(x, 4))
    model = float_model(data)
    assert "BatchNormalization" not in operators(model.onnx)
    assert operators(model.onnx).count("Conv") == 1
    same_outputs(data, model.onnx)


def test_a_batchnorm_in_front_of_a_convolution_becomes_a_depthwise_one():
    net = Net()
    x = net.conv(net.relu(batchnorm(net, net.x, 3, "pre")), 4, 3, 3, 3, pads=[1, 1, 1, 1])
    data = net.model(net.head(x, 4))
    model = float_model(data)
    assert operators(model.onnx)[:2] == ("Conv", "Relu")
    assert initializers(model.onnx)["pre.weight"].shape == (3, 1, 1, 1)
    same_outputs(data, model.onnx)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_the_image_becomes_pooling(keepdims):
    net = Net()
    axes = net.constant(np.array([-1, 2]))
    x = net.node("ReduceMean", net.conv(net.x, 4, 3, 3, 3), axes, keepdims=keepdims)
    if keepdims:
        x = net.node("Flatten", x)
    data = net.model(net.node("Gemm", x, net.weight(10, 4), transB=1))
    model = float_model(data)
    assert "GlobalAveragePool" in operators(model.onnx)
    assert "ReduceMean" not in operators(model.onnx)
    same_outputs(data, model.onnx)


def test_a_scaled_gemm_with_an_odd_bias_becomes_a_plain_one():
    net = Net()
    x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    bias = net.constant(np.array([[2.5]], np.float32))
    data = net.model(net.node("Gemm", x, net.weight(3, 10), bias, alpha=0.5, beta=3.0))
    model = float_model(data)
    constants = initializers(model.onnx)
    bias = next(v for v in constants.values() if v.shape == (10,))
    np.testing.assert_array_equal(bias, [7.5] * 10)
    same_outputs(data, model.onnx)


def test_dropout_at_inference_goes_away_and_an_active_one_is_refused():
    def model(training: bool) -> bytes:
        net = Net()
        ratio, mode = net.constant(np.array(0.5, np.float32)), net.constant(np.array(training))
        x = net.node("Dropout", net.conv(net.x, 4, 3, 3, 3), ratio, mode)
        return net.model(net.head(x, 4))

    assert "Dropout" not in operators(float_model(model(training=False)).onnx)
    with pytest.raises(InputError, match=r"Dropout .* is active"):
        float_model(model(training=True))


def test_a_fixed_batch_is_freed_also_inside_a_reshape():
    net = Net()
    x = net.node("GlobalAveragePool", net.conv(net.x, 4, 3, 3, 3))
    x = net.node("Reshape", x, net.constant(np.array([1, 4])))
    proto = onnx.ModelProto.FromString(net.model(net.node("Gemm", x, net.weight(10, 4), transB=1)))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    model = float_model(proto.SerializeToString())
    assert open_session(model.onnx).logits(np.zeros((7, 3, 8, 8), np.float32)).shape == (7, 10)


def test_a_model_that_needs_its_batch_is_refused():
    net = Net()
    x = net.node("GlobalAveragePool", net.conv(net.x, 4, 3, 3, 3))
    x = net.node("Reshape", x, net.constant(np.array([2, 4])))
    data = net.model(net.node("Gemm", x, net.weight(10, 4), transB=1))
    with pytest.raises(InputError):
        float_model(data)


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_other_opsets_are_brought_to_ours(opset):
    data = residual_net()
    proto = onnx.ModelProto.FromString(data)
    proto.opset_import[0].version = opset
    model = float_model(proto.SerializeToString())
    assert parse(model.onnx).opset_imports[""] == 21
    assert parse(model.onnx).ir_version == 10
    same_outputs(data, model.onnx)


def test_nothing_tells_of_the_machine_it_was_made_on():
    proto = onnx.ModelProto.FromString(residual_net())
    place = "/home/alice/secret/train.py"
    proto.doc_string, proto.producer_name, proto.domain = place, place, place
    proto.metadata_props.add(key="path", value=place)
    proto.graph.doc_string = proto.graph.name = place
    for node in proto.graph.node:
        node.doc_string = place
        node.metadata_props.add(key="stack_trace", value=place)
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = place
    assert b"alice" not in float_model(proto.SerializeToString()).onnx


def test_nodes_are_called_after_their_weights():
    names = [node.name for node in parse(float_model(residual_net()).onnx).graph]
    assert names[:3] == ["stem", "Relu_1", "block"]
    assert names[-1] == "fc"


def test_names_that_could_command_a_terminal_are_tamed():
    net = Net()
    x = net.conv(net.x, 4, 3, 3, 3, name="\x1b[31mred")
    names = [node.name for node in parse(float_model(net.model(net.head(x, 4))).onnx).graph]
    assert names[0] == "__31mred"


def two_outputs(proto):
    node = proto.graph.node.add(op_type="Neg", input=[proto.graph.output[0].name], output=["more"])
    output = proto.graph.output.add()
    output.CopyFrom(proto.graph.output[0])
    output.name = node.output[0]


def flat_input(proto):
    del proto.graph.input[0].type.tensor_type.shape.dim[3]


def dynamic_size(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"


def integer_input(proto):
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (two_outputs, "has 2 outputs"),
        (dynamic_size, "leaves the size of images open"),
        (flat_input, ""),
        (integer_input, ""),
    ],
)
def test_what_is_no_image_classifier_is_refused(change, complaint):
    proto = onnx.ModelProto.FromString(residual_net())
    change(proto)
    with pytest.raises((InputError, UsageError)) as error:
        read(proto)
    assert complaint in str(error.value)


def read(proto: onnx.ModelProto) -> None:
    check(proto, "model.onnx")
    float_model(proto.SerializeToString())


def test_a_segmentation_model_is_no_classifier():
    net = Net()
    x = net.conv(net.x, 4, 3, 3, 3)
    proto = onnx.ModelProto.FromString(net.model(x, classes=4))
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for size in (1, 4, 6, 6):
        proto.graph.output[0].type.tensor_type.shape.dim.add(dim_value=size)
    with pytest.raises(InputError, match=r"not \(batch, classes\)"):
        float_model(proto.SerializeToString())


def test_an_input_shape_must_not_contradict_the_file():
    origin = Origin("net.onnx", "", "ONNX")
    loaded = Loaded(origin, onnx.ModelProto.FromString(residual_net()), "onnx")
    with pytest.raises(UsageError, match=r"takes \(3, 8, 8\), not \(3, 32, 32\)"):
        export(loaded, stated=Stated((3, 32, 32)))


def test_logits_that_are_not_finite_are_noticed():
    net = Net()
    x = net.node("Log", net.node("Neg", net.relu(net.conv(net.x, 4, 3, 3, 3))))
    with pytest.raises(InputError, match="not finite"):
        float_model(net.model(net.head(x, 4)))


def test_an_output_may_have_a_name_that_is_to_be_given():
    net = Net()
    a = net.relu(net.conv(net.x, 4, 3, 3, 3))
    data = net.model(net.head(net.relu(net.conv(a, 4, 4, 3, 3)), 4))
    renamed = onnx.ModelProto.FromString(data)
    old, new = renamed.graph.output[0].name, "Relu_1:out"
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = new
    assert old != new
    model = float_model(renamed.SerializeToString())
    assert model.output_name == new
    same_outputs(data, model.onnx)


def test_weights_that_constants_alone_compute_are_constants_whatever_their_size():
    """Standardized weights, and one behind a Reshape, each larger than what is always folded."""
    net = Net()
    raw = net.weight(256, 128, 3, 3)
    mean = net.node("ReduceMean", raw, net.constant(np.array([1, 2, 3])))
    centred = net.node("Sub", raw, mean)
    squares = net.node("Mul", centred, centred)
    deviation = net.node("Sqrt", net.node("ReduceMean", squares, net.constant(np.array([1, 2, 3]))))
    standard = net.node("Div", centred, deviation)
    a = net.relu(net.conv(net.x, 128, 3, 3, 3))
    b = net.relu(net.node("Conv", a, standard))
    pooled = net.node("Flatten", net.node("GlobalAveragePool", b), axis=1)
    moved = net.node("Reshape", net.weight(1 << 18, 2), net.constant(np.array([256, 2048])))
    c = net.relu(net.node("MatMul", pooled, moved))
    data = net.model(net.node("MatMul", c, net.weight(2048, 10)))
    model = float_model(data)
    sites, left = find_sites(parse(model.onnx))
    assert [site.shape for site in sites] == [
        (128, 3, 3, 3), (256, 128, 3, 3), (256, 2048), (2048, 10)
    ]  # fmt: skip
    assert not left
    same_outputs(data, model.onnx)


def test_folding_ends_where_it_would_take_long():
    """A chain of a thousand nodes over one large constant is not computed to its end."""
    net = Net()
    weight = net.weight(1 << 20)
    for _ in range(1000):
        weight = net.node("Neg", weight)
    scale = net.node("ReduceMean", weight, keepdims=0)
    x = net.node("Mul", net.conv(net.x, 4, 3, 3, 3), scale)
    model = parse(net.model(net.head(x, 4)))
    simplify(model)
    left = sum(node.op_type == "Neg" for node in model.graph)
    assert left > 900


def test_biases_survive_as_they_were():
    proto = onnx.ModelProto.FromString(residual_net())
    want = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    got = initializers(float_model(residual_net()).onnx)
    np.testing.assert_array_equal(got["stem.weight"], want["stem.weight"])


def test_a_constant_that_already_has_a_name_to_be_given_is_in_nobodys_way():
    net = Net()
    x = net.relu(net.conv(net.x, 4, 3, 3, 3))  # its weight will be Conv_1.weight
    weight, bias = net.weight(4, 4, 3, 3), net.constant(np.ones(4, np.float32), "Conv_1.weight")
    data = net.model(net.head(net.node("Conv", x, weight, bias), 4))
    model = float_model(data)
    assert {"Conv_1.weight", "Conv_2.bias"} <= set(initializers(model.onnx))
    same_outputs(data, model.onnx)
