"""What in a file is no rounding of its float model is told, with its place."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    QuantType,
)

from qdeploy.graph.io import initializers, parse, serialize
from qdeploy.provenance.stored import with_constants
from qdeploy.provenance.trace import Provenance, trace
from qdeploy.provenance.unquantize import unquantize
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.methods import Nearest
from tests.nets import Net, float_model, residual_net
from tests.provenance_lab import (
    batchnorm_net,
    by_the_runtime,
    changed,
    messages,
    mobile_net,
    node_of,
    quantized,
    source,
    storing,
    x_of,
)


@pytest.fixture(scope="module")
def ours(images) -> bytes:
    """The residual net rounded to nearest."""
    return quantized(source("residual"), images, Nearest())[0].onnx


@pytest.mark.parametrize(("by", "steps"), [(1, 1.5), (5, 5.5)])
def test_one_changed_integer_is_seen(ours, by, steps):
    model = source("residual")
    codes = initializers(ours)["block.weight.quantized"].copy()
    codes.flat[17] += by if codes.flat[17] < 2 else -by
    tampered = with_constants(ours, {"block.weight.quantized": codes})
    assert tampered is not None
    found = trace(tampered, model)
    layer = next(layer for layer in found.layers if layer.name == "block")
    assert layer.flipped * layer.weights == pytest.approx(1)
    assert by - 0.5 <= layer.steps <= steps
    assert found.same_network == (by == 1 and not layer.changed)
    assert sum(layer.flipped for layer in found.layers) == layer.flipped
    if by == 5:
        assert layer.changed
        assert not layer.nearest_rounded
    assert found.nearest is not None
    assert trace(found.nearest, model).flipped == 0
    np.testing.assert_array_equal(
        initializers(found.nearest)["block.weight.quantized"],
        initializers(ours)["block.weight.quantized"],
    )


def test_weights_of_another_model_are_no_rounding_of_the_source(images):
    other = float_model(residual_net(seed=9))
    found = trace(quantized(other, images, Nearest())[0].onnx, source("residual"))
    assert all("bias" in difference.message for difference in found.differences)
    assert all(layer.changed for layer in found.layers)
    assert not found.same_network


def test_a_changed_bias_is_measured(ours):
    codes = initializers(ours)["block.bias.quantized"] * 3
    tampered = with_constants(ours, {"block.bias.quantized": codes})
    assert tampered is not None
    shifts = {x.name: x.bias_shift for x in trace(tampered, source("residual")).layers}
    assert shifts.pop("block") > 0.1
    assert max(shifts.values()) < 0.01


def without_relu(graph: ir.Graph) -> None:
    relu = next(n for n in graph if n.op_type == "Relu")
    relu.outputs[0].replace_all_uses_with(relu.inputs[0])
    for pair in ("quantize", "dequantize"):  # the range keeps its negative half
        node = node_of(graph, f"{relu.outputs[0].name}.{pair}")
        zero = ir.val("other.zero", const_value=ir.tensor(np.array(9, np.uint8), name="other.zero"))
        if pair == "quantize":
            graph.register_initializer(zero)
        node.replace_input_with(2, graph.initializers["other.zero"])
    graph.remove(relu, safe=True)


def with_added_constant(graph: ir.Graph) -> None:
    conv = node_of(graph, "block")
    nudge = ir.val("nudge", const_value=ir.tensor(np.array(0.3, np.float32), name="nudge"))
    graph.register_initializer(nudge)
    add = ir.node("Add", [conv.outputs[0], nudge], name="added")
    insert_behind(graph, conv, add)


def with_other_pads(graph: ir.Graph) -> None:
    node_of(graph, "stem").attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 2, 2])


def with_second_path(graph: ir.Graph) -> None:
    """From the image around the network to the logits."""
    gemm = node_of(graph, "fc")
    values = {"way.w": np.ones((10, 3), np.float32), "way.s": np.array([0, 3], np.int64)}
    for name, value in values.items():
        graph.register_initializer(ir.val(name, const_value=ir.tensor(value, name=name)))
    pool = ir.node("GlobalAveragePool", [graph.inputs[0]], name="way")
    flat = ir.node("Reshape", [pool.outputs[0], graph.initializers["way.s"]], name="flat")
    side = ir.node("Gemm", [flat.outputs[0], graph.initializers["way.w"]], {"transB": 1})
    add = ir.node("Add", [gemm.outputs[0], side.outputs[0]], name="joined")
    name, kind, shape = (getattr(gemm.outputs[0], k) for k in ("name", "type", "shape"))
    insert_behind(graph, gemm, add)
    for node in (pool, flat, side):
        graph.insert_before(add, node)
    gemm.outputs[0].name = "inner"
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = name, kind, shape


def with_extra_activation(graph: ir.Graph) -> None:
    conv = node_of(graph, "block")
    insert_behind(graph, conv, ir.node("Relu", [conv.outputs[0]], name="extra"))


def with_other_operator(graph: ir.Graph) -> None:
    pool = next(n for n in graph if n.op_type == "GlobalAveragePool")
    other = ir.node("GlobalMaxPool", [pool.inputs[0]], name="other")
    insert_behind(graph, pool, other)
    graph.remove(pool, safe=True)


def insert_behind(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    readers = [use for use in node.outputs[0].uses() if use.node is not new]
    if node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        new.replace_input_with(0, node.outputs[0])
    for use in readers:
        use.node.replace_input_with(use.idx, new.outputs[0])
    graph.insert_after(node, new)


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        (without_relu, "block", "not cut in the file, cut to [0, inf] in the source"),
        (with_extra_activation, "Add_1", "cut to [0, inf] in the file, not cut in the source"),
        (with_added_constant, "Add_1", "reads Add 'Add_1' in the file, Conv 'block' in the source"),
        (with_other_pads, "stem", "pads (0, 0, 2, 2) in the file, (1, 1, 1, 1) in the source"),
        (with_second_path, "output", "reads Add 'Add_2' in the file, Gemm 'fc' in the source"),
        (with_other_operator, "Reshape_1", "reads GlobalMaxPool"),
    ],
)
def test_a_graph_that_computes_something_else_is_told_from_the_source(ours, change, where, says):
    found = trace(changed(ours, change), source("residual"))
    assert found.not_compared is None
    assert any(d.where == where and says in d.message for d in found.differences), messages(found)
    assert len(found.differences) <= 2
    assert {(d.rule, d.level) for d in found.differences} == {("graph-differs", "error")}
    assert not found.same_network
    assert len(found.layers) == 6  # the walk goes on behind the difference
    assert found.flipped == 0


def test_parts_in_the_place_of_others_are_told(ours):
    """A convolution fed from elsewhere, with the same operators and attributes everywhere."""

    def cross(graph: ir.Graph) -> None:
        block, depthwise = node_of(graph, "block"), node_of(graph, "depthwise")
        block.replace_input_with(0, graph.inputs[0])
        weight = ir.val("w", const_value=ir.tensor(np.ones((8, 3, 3, 3), np.float32), name="w"))
        graph.register_initializer(weight)
        block.replace_input_with(1, weight)
        assert depthwise.inputs[0] is not None

    found = trace(changed(ours, cross), source("residual"))
    assert any("block" in d.message for d in found.differences)
    assert not found.same_network


def test_one_layer_in_the_place_of_two_is_no_match():
    def twice(data: bytes) -> bytes:
        def change(graph: ir.Graph) -> None:
            second = node_of(graph, "b")
            second.outputs[0].replace_all_uses_with(node_of(graph, "a").outputs[0])

        return changed(data, change)

    net = Net(seed=6)
    a, b = (net.conv(net.x, 4, 3, 3, 3, name=name) for name in "ab")
    model = float_model(net.model(net.head(net.node("Add", a, b), 4)))
    assert not trace(model.onnx, model).differences
    assert "not Conv 'b' of the source" in messages(trace(twice(model.onnx), model)) or (
        "not Conv 'a' of the source" in messages(trace(twice(model.onnx), model))
    )


def constants_net(scale: float = 1.0, shape: tuple[int, ...] = (2, 4, 9)) -> bytes:
    """A constant that is added, one that reshapes, and a slope in an attribute."""
    net = Net(seed=8)
    x = net.conv(net.x, 4, 3, 3, 3, name="stem", strides=[2, 2])
    x = net.node("LeakyRelu", x, alpha=0.2 * scale)
    offset = np.linspace(-1, 1, 36, dtype=np.float32).reshape(4, 3, 3)
    x = net.node("Add", x, net.constant(offset * np.float32(scale)))
    x = net.node("Softplus", net.node("Neg", x))
    x = net.node("Reshape", x, net.constant(np.array([-1, *shape[1:]])))
    x = net.node("ReduceMax", x, net.constant(np.array([1])), keepdims=0)
    return net.model(net.node("Gemm", x, net.weight(shape[2], 10, name="fc.weight")))


def test_constants_may_be_rounded_and_not_replaced(tmp_path):
    model = float_model(constants_net())
    settings = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    rounded = by_the_runtime(tmp_path, constants_net(), **settings)
    assert messages(trace(rounded, model)) == ""
    other = messages(trace(by_the_runtime(tmp_path, constants_net(1.1), **settings), model))
    assert "Add_1: 'Add_1' reads a constant that is 0.10" in other
    assert "'LeakyRelu_1' has alpha 0.22 in the file, 0.2 in the source" in other
    assert "[-1, 9, 4] in the file, [-1, 4, 9] in the source" in messages(
        trace(constants_net(shape=(2, 9, 4)), model)
    )


def test_a_classifier_of_other_images_or_classes_is_told():
    def small(classes: int, shape: tuple[int, int, int]) -> bytes:
        net = Net(shape)
        return net.model(net.head(net.conv(net.x, 4, 3, 3, 3, name="a"), 4, classes), classes)

    model = float_model(small(10, (3, 8, 8)))
    assert not trace(small(10, (3, 8, 8)), model).differences
    for classes, shape in ((7, (3, 8, 8)), (10, (3, 9, 8))):
        found = trace(small(classes, shape), model)
        assert any("takes and gives" in d.message for d in found.differences)


def test_a_missing_branch_is_told_and_the_walk_goes_on(ours):
    def cut(graph: ir.Graph) -> None:
        add = next(n for n in graph if n.op_type == "Add")
        add.outputs[0].replace_all_uses_with(add.inputs[0])  # type: ignore[arg-type]

    found = trace(changed(ours, cut), source("residual"))
    assert "in the file, Add 'Add_1' in the source" in messages(found)
    assert [layer.name for layer in found.layers if layer.name == "stem"]


def test_at_most_twenty_differences_are_told():
    def deep(pads: int) -> bytes:
        net = Net(seed=1)
        x = net.x
        for i in range(25):
            x = net.conv(x, 3, 3, 3, 3, name=f"l{i}", pads=[pads, pads, 2 - pads, 2 - pads])
        return net.model(net.head(x, 3))

    assert len(trace(deep(2), float_model(deep(1))).differences) == 20


def test_weights_in_blocks_are_traced():
    """Blocks of 4 along the inputs of a product, each with its own scale."""
    net = Net(seed=2)
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    x = net.relu(net.node("Gemm", flat, net.weight(3, 12, name="a.weight"), net.weight(12)))
    model = float_model(net.model(net.node("MatMul", x, net.weight(12, 10, name="b.weight"))))
    weight = initializers(model.onnx)["b.weight"]
    scale = (np.abs(weight).reshape(3, 4, 10).max(axis=1) / 7).astype(np.float32)
    codes = np.rint(weight / np.repeat(scale, 4, axis=0)).astype(np.int8)

    data = changed(model.onnx, storing("b.weight", codes, scale, axis=0, block_size=4))
    (layer,) = trace(data, model).layers
    assert (layer.name, layer.bits, layer.flipped) == ("b", 4, 0)
    flipped = with_constants(data, {"b.weight.q": codes - np.sign(codes)})
    assert flipped is not None
    found = trace(flipped, model)
    assert found.flipped > 0.5
    assert found.nearest is not None
    np.testing.assert_array_equal(initializers(found.nearest)["b.weight.q"], codes)


@pytest.mark.parametrize(
    ("scale", "says"),
    [(np.zeros(8, np.float32), "are 0"), (np.ones(3, np.float32), "scales")],
)
def test_a_grid_that_means_nothing_is_not_compared(ours, scale, says):
    def spoil(graph: ir.Graph) -> None:
        value = graph.initializers["block.weight.scale"]
        value.const_value = ir.tensor(scale, name=value.name)
        value.shape = ir.Shape(scale.shape)

    found = trace(changed(ours, spoil), source("residual"))
    assert says in (found.not_compared or "")
    assert found.layers == ()


def test_flips_of_weights_that_lie_at_the_edges_of_their_cells_count():
    """Where attacks keep them: a thousandth of a step from the middle of two codes."""
    net = Net(seed=2)
    x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    steps = np.tile(np.array([-7, -3.501, -0.499, 1.501, 2.499], np.float32), (3, 2))
    weight = net.constant(steps * np.float32(0.01), "a.weight")
    model = float_model(net.model(net.node("MatMul", x, weight)))
    down = np.floor(steps).astype(np.int8)

    store = storing("a.weight", down, np.array(0.01, np.float32))
    (layer,) = trace(changed(model.onnx, store), model).layers
    assert layer.flipped == pytest.approx(0.4)  # -0.499 and 1.501 went down


def test_weights_beyond_the_grid_are_counted_and_not_measured():
    """A scale that cuts the outermost weights, as the one of least squared error does."""
    net = Net(seed=2)
    x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    model = float_model(net.model(net.node("MatMul", x, net.weight(3, 10, name="a.weight"))))
    weight = initializers(model.onnx)["a.weight"]
    scale = np.float32(np.abs(weight).max() / 14)
    codes = np.clip(np.rint(weight / scale), -7, 7).astype(np.int8)

    store = storing("a.weight", codes, np.array(scale))
    (layer,) = trace(changed(model.onnx, store), model).layers
    assert layer.saturated == np.count_nonzero(np.abs(weight / scale) > 7.5) > 0
    assert layer.flipped == 0
    assert layer.steps <= 0.501


@pytest.mark.parametrize(("want", "have"), [((0, 0), (1, 1)), ((0, 1), (1, 0))])
def test_outputs_of_one_node_in_each_others_place_are_told(want, have):
    """Two halves of the image's channels."""

    def data(halves: tuple[int, int]) -> bytes:
        net = Net((4, 8, 8), seed=3)
        split = ir.node("Split", [net.x], {"axis": 1, "num_outputs": 2}, num_outputs=2)
        split.outputs[0].name, split.outputs[1].name = "left", "right"
        net.nodes.append(split)
        first, second = (split.outputs[i] for i in halves)
        return net.model(net.head(net.node("Sub", net.node("Neg", first), second), 2))

    model = float_model(data(want))
    assert not trace(data(want), model).differences
    assert trace(data(have), model).differences


def test_a_bias_that_is_computed_from_the_images_is_refused(ours):
    """Channels have one bias for all images, so it mixes them: that rule comes first."""

    def steer(graph: ir.Graph) -> None:
        axes = ir.val("axes", const_value=ir.tensor(np.array([0, 1, 2, 3]), name="axes"))
        shape = ir.val("eight", const_value=ir.tensor(np.array([8]), name="eight"))
        for value in (axes, shape):
            graph.register_initializer(value)
        mean = ir.node("ReduceMean", [graph.inputs[0], axes], {"keepdims": 0}, name="mean")
        bias = ir.node("Expand", [mean.outputs[0], shape], name="bias")
        for node in (mean, bias):
            graph.insert_before(node_of(graph, "block"), node)
        node_of(graph, "block").replace_input_with(2, bias.outputs[0])

    found = trace(changed(ours, steer), source("residual"))
    assert "mixes the images of a batch" in (found.not_compared or "")


def test_an_input_that_only_the_file_has_is_told():
    """Of a node that holds no layer."""

    def data(extra: bool) -> bytes:
        net = Net(seed=3)
        x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
        x = net.node("Gemm", x, net.weight(3, 10, name="a.weight"))
        scale, shift = (net.constant(np.linspace(0.1, 1, 10, dtype=np.float32)) for _ in "ab")
        return net.model(net.node("LayerNormalization", x, scale, *[shift] * extra))

    model = float_model(data(extra=False))
    assert not trace(data(extra=False), model).differences
    assert trace(data(extra=True), model).differences


def test_a_channel_that_only_the_file_multiplies_by_zero_is_no_rounding(tmp_path):
    model = float_model(batchnorm_net())
    kept = by_the_runtime(tmp_path, batchnorm_net(), op_types_to_quantize=["Conv"])
    gamma = initializers(kept)["bn1.weight"].copy()
    gamma[2] = 0
    silenced = with_constants(kept, {"bn1.weight": gamma})
    assert silenced is not None
    assert not trace(kept, model).layers[1].changed
    assert trace(silenced, model).layers[1].changed


def test_a_constant_on_a_coarse_grid_is_not_taken_for_a_rounded_one():
    model = float_model(constants_net())
    name, value = next((k, v) for k, v in initializers(model.onnx).items() if v.shape == (4, 3, 3))

    store = storing(name, np.rint(value + 1).astype(np.int8), np.array(1, np.float32))
    assert "away from the source's" in messages(trace(changed(model.onnx, store), model))


def test_the_operator_that_marks_ranges_is_not_compared():
    net = Net(seed=3)
    data = net.model(net.head(net.node("Shrink", net.x, lambd=0.5), 3))
    assert "Shrink" in (trace(data, float_model(data)).not_compared or "")
    assert "Shrink" in (trace(data, source("plain")).not_compared or "")


def test_names_in_the_file_are_not_in_the_way_of_prepared_ones():
    def data(start: str, end: str) -> bytes:
        net = Net(seed=3)
        bounds = [net.constant(np.array([i]), name) for i, name in ((1, start), (3, end))]
        x = net.node("Slice", net.x, *bounds, net.constant(np.array([1])))
        return net.model(net.head(x, 2))

    model = float_model(data("start", "end"))
    found = trace(data("Slice_1.input2", "Slice_1.weight"), model)
    assert (found.not_compared, found.differences) == (None, ())


def test_a_weight_that_the_file_holds_transposed_is_traced_in_the_sources_layout():
    net = Net(seed=2)
    x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    model = float_model(net.model(net.node("MatMul", x, net.weight(3, 10, name="a.weight"))))
    weight = initializers(model.onnx)["a.weight"]
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    codes = np.rint(weight / scale).astype(np.int8)
    turned = np.ascontiguousarray(codes.T)

    def store(graph: ir.Graph) -> None:
        values = []
        for name, held in {"q": turned, "s": scale, "z": np.zeros(10, np.int8)}.items():
            values.append(ir.val(name, const_value=ir.tensor(held, name=name)))
            graph.register_initializer(values[-1])
        node = ir.node("DequantizeLinear", values, {"axis": 0}, name="dq")
        back = ir.node("Transpose", [node.outputs[0]], {"perm": [1, 0]}, name="back")
        for new in (node, back):
            graph.insert_before(graph[-1], new)
        graph.initializers["a.weight"].replace_all_uses_with(back.outputs[0])
        del graph.initializers["a.weight"]

    data = changed(model.onnx, store)
    (layer,) = trace(data, model).layers
    assert (layer.flipped, layer.shape) == (0, (3, 10))
    assert layer.codes_sha256 == hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()
    flipped = with_constants(data, {"q": turned - np.sign(turned)})
    assert flipped is not None
    nearest = trace(flipped, model).nearest
    assert nearest is not None
    np.testing.assert_array_equal(initializers(nearest)["q"], turned)


def test_float_weights_in_the_file_must_be_the_sources():
    model = source("plain")
    other = with_constants(
        model.onnx, {"first.weight": initializers(model.onnx)["first.weight"] * 1.1}
    )
    assert other is not None
    (finding,) = trace(other, model).differences
    assert finding.where == "first"


def test_a_range_that_starts_at_zero_where_the_source_has_no_relu_is_named(ours):
    """The quantizer's range is no matter of the graph, and its reader should know of it."""

    def cut(graph: ir.Graph) -> None:
        zero = ir.val("none", const_value=ir.tensor(np.array(0, np.uint8), name="none"))
        graph.register_initializer(zero)
        for kind in ("quantize", "dequantize"):
            node_of(graph, f"block:out.{kind}").replace_input_with(2, zero)

    found = trace(changed(ours, cut), source("residual"))
    assert not found.differences
    assert found.cut_at_zero == ("block:out",)


def test_a_clip_that_a_quantizer_dropped_without_keeping_its_top_is_a_difference(tmp_path):
    data = by_the_runtime(tmp_path, mobile_net(), activation_type=QuantType.QUInt8)
    assert "Clip" not in {node.op_type for node in parse(data).graph}

    def widen(graph: ir.Graph) -> None:
        name = next(
            n for n in graph.initializers if (n.endswith("_scale") and n.startswith("v0"))
            or n == "v1_scale"
        )  # fmt: skip
        old = graph.initializers[name].const_value
        assert old is not None
        graph.initializers[name].const_value = ir.tensor(old.numpy() * np.float32(3), name=name)

    assert not trace(data, source("mobile")).differences
    assert "in the source" in messages(trace(changed(data, widen), source("mobile")))


def test_a_pair_that_multiplies_is_not_compared(ours):
    def double(graph: ir.Graph) -> None:
        scale = ir.val("s", const_value=ir.tensor(np.array(0.5, np.float32), name="s"))
        graph.register_initializer(scale)
        node_of(graph, "block:out.dequantize").replace_input_with(1, scale)

    found = trace(changed(ours, double), source("residual"))
    assert found.not_compared is not None
    assert "different scales" in found.not_compared
    assert not found.same_network
    assert not found.nearest_rounded


def test_no_file_at_all_is_not_compared():
    assert "not an ONNX file" in (trace(b"no model", source("plain")).not_compared or "")


def test_integer_arithmetic_between_the_pair_is_not_compared(ours):
    """What only hands codes on is as good as what hands values on."""

    def trace_with(op_type: str) -> Provenance:
        def move(graph: ir.Graph) -> None:
            quantize_node = node_of(graph, "block:out.quantize")
            turn = ir.node(op_type, [quantize_node.outputs[0]], name="turn")
            insert_behind(graph, quantize_node, turn)

        return trace(changed(ours, move), source("residual"))

    assert "Abs" in (trace_with("Abs").not_compared or "")
    assert trace_with("Identity").same_network


def test_unquantized_floats_are_what_the_runtime_computes_with(ours):
    """Without ranges nothing is cut, so that weights alone tell."""
    recipe_free = source("residual")
    found = unquantize(ours, opset=21, ir_version=10, where="file")
    twin = serialize(found.twin)
    weights = initializers(twin)
    assert {t.grid.storage for t in found.tensors} == {"int8", "int32"}
    for tensor in found.tensors:
        assert any(np.array_equal(tensor.values, w) for w in weights.values())
    a, b = (open_session(m).logits(x_of(recipe_free)) for m in (twin, ours))
    assert np.square(a - b).mean() < 0.01 * b.var()
