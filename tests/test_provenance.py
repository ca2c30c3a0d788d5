"""What was done to a float model is read off the quantized file, whoever made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from qdeploy.cli import main
from qdeploy.core.grids import Grid, quantize
from qdeploy.data import Images
from qdeploy.device import load_device
from qdeploy.graph.io import check, initializers, parse, parse_proto, serialize
from qdeploy.graph.stored import with_constants
from qdeploy.graph.unquantize import unquantize
from qdeploy.methods import EfrapDescent, Nearest, Rounding
from qdeploy.model import FloatModel, Grids, QuantizedModel, QuantPlan
from qdeploy.recipe import load_recipe
from qdeploy.runtime.sessions import open_session
from qdeploy.scan.provenance import TIE, Provenance, trace
from qdeploy.stages.calibrate import calibrate
from qdeploy.stages.emit import emit
from qdeploy.stages.plan import plan_layers
from qdeploy.stages.rounding import RoundingTask, round_layers
from tests.nets import Net, float_model, residual_net


def plain_net() -> bytes:
    net = Net(seed=1)
    x = net.relu(net.conv(net.x, 8, 3, 3, 3, name="first", pads=[1, 1, 1, 1]))
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.relu(net.conv(x, 16, 8, 3, 3, name="second", strides=[2, 2]))
    return net.model(net.head(x, 16))


def mobile_net() -> bytes:
    """Depthwise convolutions, cut to [0, 6] or [0, 1], which is often reached."""
    net = Net(seed=2)
    zero = net.constant(np.array(0, np.float32))
    six, one = (net.constant(np.array(v, np.float32)) for v in (6, 1))
    x = net.node("Clip", net.conv(net.x, 8, 3, 3, 3, name="stem", strides=[2, 2]), zero, one)
    a = net.conv(x, 8, 1, 3, 3, name="depthwise", group=8, pads=[1, 1, 1, 1])
    b = net.conv(net.node("Clip", a, zero, six), 8, 8, 1, 1, name="project")
    x = net.node("Clip", net.conv(net.node("Add", x, b), 16, 8, 1, 1, name="last"), zero, six)
    return net.model(net.head(x, 16))


def matmul_net() -> bytes:
    """Products without a bias, with one, of the other orientation, and of two activations."""
    net = Net(seed=3)
    x = net.node("Flatten", net.relu(net.conv(net.x, 4, 3, 3, 3, name="stem", strides=[2, 2])))
    x = net.relu(net.node("MatMul", x, net.weight(36, 12, name="plain.weight")))
    product = net.node("MatMul", x, net.weight(12, 16, name="biased.weight"))
    x = net.relu(net.node("Add", product, net.weight(16)))
    gate = net.node("Sigmoid", net.node("MatMul", x, net.weight(16, 16, name="gate.weight")))
    x = net.node("Mul", x, gate)
    return net.model(net.node("Gemm", x, net.weight(16, 10, name="fc.weight"), net.weight(10)))


def shared_net() -> bytes:
    net = Net(seed=4)
    weight = net.weight(3, 3, 1, 1, name="shared.weight")
    x = net.relu(net.node("Conv", net.x, weight, net.weight(3)))
    x = net.relu(net.node("Conv", x, weight))
    return net.model(net.head(x, 3))


def batchnorm_net() -> bytes:
    """BatchNorms that have not been folded into their convolutions; some turn the sign."""
    net = Net(seed=5)
    x = net.x
    for i, channels in enumerate((3, 8)):
        x = net.conv(x, 8, channels, 3, 3, name=f"conv{i}", pads=[1, 1, 1, 1])
        factors = [net.weight(8, name=f"bn{i}.{part}") for part in ("weight", "shift", "mean")]
        variance = net.constant(net.rng.uniform(0.5, 2, 8).astype(np.float32))
        x = net.relu(net.node("BatchNormalization", x, *factors, variance))
    return net.model(net.head(x, 8))


NETS = {
    "residual": residual_net, "plain": plain_net, "mobile": mobile_net,
    "matmul": matmul_net, "shared": shared_net,
}  # fmt: skip
every_net = pytest.mark.parametrize("name", NETS)


@cache
def source(name: str) -> FloatModel:
    return float_model(NETS[name]())


def quantized(
    model: FloatModel, images: Images, rounding: Rounding, device: str = "x86-vnni"
) -> tuple[QuantizedModel, QuantPlan, Grids]:
    recipe = load_recipe("int4").model_copy(update={"rounding": rounding})
    plan = plan_layers(model, recipe, load_device(device))
    grids = calibrate(model, plan, images, recipe.activations)
    rounded = round_layers(RoundingTask(model, plan, grids, images, 0), rounding)
    return emit(model, plan, grids, rounded), plan, grids


class RandomImages(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(0)
        shape = (16, 3, 8, 8)
        self.left: Iterator[dict[str, np.ndarray]] = iter(
            [{name: rng.normal(size=shape).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def by_the_runtime(folder: Path, data: bytes, **settings: object) -> bytes:
    """The file that onnxruntime's own quantizer makes of a float model."""
    (folder / "float.onnx").write_bytes(data)
    reader = RandomImages(str(parse(data).graph.inputs[0].name))
    quantize_static(folder / "float.onnx", folder / "quantized.onnx", reader, **settings)
    return (folder / "quantized.onnx").read_bytes()


def changed(data: bytes, change: Callable[[ir.Graph], None]) -> bytes:
    model = parse(data)
    change(model.graph)
    model.graph.sort()
    return serialize(model)


def storing(
    name: str, codes: np.ndarray, scale: np.ndarray, **attributes: int
) -> Callable[[ir.Graph], None]:
    """A change that stores the constant `name` as `codes` on a grid around 0."""

    def store(graph: ir.Graph) -> None:
        held = {"q": codes, "s": scale, "z": np.zeros(scale.shape, codes.dtype)}
        values = [ir.val(f"{name}.{k}", const_value=ir.tensor(v)) for k, v in held.items()]
        for value in values:
            graph.register_initializer(value)
        node = ir.node("DequantizeLinear", values, attributes, name=f"{name}.dq")
        graph.insert_before(graph[0], node)
        graph.initializers[name].replace_all_uses_with(node.outputs[0])
        del graph.initializers[name]

    return store


def node_of(graph: ir.Graph, name: str) -> ir.Node:
    return next(node for node in graph if node.name == name)


def messages(found: Provenance) -> str:
    return "\n".join(f"{d.where}: {d.message}" for d in found.differences)


def x_of(model: FloatModel) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(4, *model.input_shape)).astype(np.float32)


@every_net
@pytest.mark.parametrize("device", ["x86-vnni", "compact"])
def test_our_file_rounded_to_nearest_is_the_source_and_nothing_else(name, device, images):
    model = source(name)
    result, plan, _ = quantized(model, images, Nearest(), device)
    found = trace(result.onnx, model)
    assert found.not_compared is None
    assert not found.differences
    assert [layer.name for layer in found.layers] == [layer.site.name for layer in plan.layers]
    assert {(x.storage, x.bits) for x in found.layers} == {(plan.layers[0].storage.value, 4)}
    assert found.flipped == 0
    assert found.steps <= 0.5 + 1e-5
    assert found.nearest is None
    assert found.nearest_rounded
    assert found.cut_at_zero == ()


@every_net
def test_the_flips_and_digests_of_our_file_are_those_of_the_run(name, images):
    model = source(name)
    result, plan, grids = quantized(model, images, EfrapDescent())
    found = trace(result.onnx, model)
    assert not found.differences
    for layer, rounded, planned in zip(found.layers, result.layers, plan.layers, strict=True):
        grid = grids.weights[rounded.name]
        assert layer.name == rounded.name
        assert layer.codes_sha256 == rounded.sha256
        digest = hashlib.sha256(grid.scale.astype("<f4").tobytes())
        digest.update(grid.zero_point.astype("<i4").tobytes())
        assert layer.scales_sha256 == digest.hexdigest()
        weight = initializers(model.onnx)[planned.site.weight]
        assert layer.flipped == pytest.approx(rounded.flipped - tied(weight, rounded.codes, grid))
        assert layer.steps <= 1
    assert found.flipped > 0.05
    assert found.same_network
    assert not found.nearest_rounded


def tied(weight: np.ndarray, codes: np.ndarray, grid: Grid) -> float:
    """Share of codes that were flipped where the weight lies in the middle of two."""
    steps = weight / grid.scale.reshape(grid.along(weight.ndim))
    middle = np.abs(steps - np.floor(steps) - 0.5) <= TIE
    return float((middle & (codes != quantize(weight, grid))).mean())


def test_the_digests_are_those_in_the_report_of_a_run(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(residual_net())
    spread = "[0.25, 0.25, 0.25]"
    card = f"[input]\nshape = [3, 8, 8]\nmean = {spread}\nstd = {spread}\n"
    (tmp_path / "net.toml").write_text(card)
    command = "sanitize net.onnx --out q.onnx --report report.json --synthetic-calibration"
    with pytest.raises(SystemExit) as leaving:
        main(command.split())
    assert leaving.value.code == 4  # nothing to judge it by
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    found = trace((tmp_path / "q.unverified.onnx").read_bytes(), net)
    assert len(found.layers) == 6
    assert {x.name: x.codes_sha256 for x in found.layers} == {
        x["name"]: x["codes_sha256"] for x in report["layers"]
    }


@every_net
def test_the_nearest_form_of_our_file_holds_the_codes_of_the_nearest_one(name, images):
    model = source(name)
    chosen, plan, grids = quantized(model, images, EfrapDescent())
    nearest, _, _ = quantized(model, images, Nearest())
    found = trace(chosen.onnx, model)
    assert found.nearest is not None
    check(parse_proto(found.nearest, "nearest"), "nearest")
    constants, weights = initializers(found.nearest), initializers(model.onnx)
    want = initializers(nearest.onnx)
    for layer in plan.layers:
        codes = constants[f"{layer.site.weight}.quantized"].astype(np.int32)
        np.testing.assert_array_equal(codes, want[f"{layer.site.weight}.quantized"])
        exact = quantize(weights[layer.site.weight], grids.weights[layer.site.name])
        np.testing.assert_array_equal(codes, exact)
    again = trace(found.nearest, model)
    assert again.nearest_rounded
    assert again.flipped == 0
    assert again.nearest is None
    assert open_session(found.nearest).logits(x_of(model)).shape == (4, 10)
    others = [k for k in initializers(chosen.onnx) if not k.endswith("weight.quantized")]
    before = initializers(chosen.onnx)
    assert all(np.array_equal(before[k], constants[k]) for k in others)


def test_a_float_file_is_its_own_source():
    for name in NETS:
        found = trace(source(name).onnx, source(name))
        assert (found.layers, found.differences, found.not_compared) == ((), (), None)
        assert found.nearest is None


@every_net
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (QuantType.QInt8, QuantType.QUInt8),
        (QuantType.QUInt8, QuantType.QUInt8),
        (QuantType.QInt8, QuantType.QInt8),
    ],
    ids=["s8u8", "u8u8", "s8s8"],
)
def test_a_file_of_the_runtimes_quantizer_is_rounded_to_nearest(
    name, per_channel, weights, activations, tmp_path
):
    """From the graph as it came, and its Relus and Clips gone."""
    data = by_the_runtime(
        tmp_path, NETS[name](), per_channel=per_channel, weight_type=weights,
        activation_type=activations,
    )  # fmt: skip
    found = trace(data, source(name))
    assert found.not_compared is None
    assert messages(found) == ""
    planned = {layer.name for layer in found.layers}
    assert len(planned) == len(found.layers) >= 2
    assert found.flipped == 0
    assert found.steps <= 0.51
    assert found.nearest is None
    assert {layer.storage for layer in found.layers} == {str(weights)[1:].lower().lstrip("q")}
    assert max(layer.bias_shift for layer in found.layers) < 0.02


@pytest.mark.parametrize(
    "extra",
    [
        {"ActivationSymmetric": True},
        {"WeightSymmetric": False},
        {"AddQDQPairToWeight": True},
        {"DedicatedQDQPair": True},
        {"QuantizeBias": False},
    ],
    ids=lambda extra: next(iter(extra)),
)
@every_net
def test_other_settings_of_the_runtimes_quantizer_make_no_difference(name, extra, tmp_path):
    data = by_the_runtime(
        tmp_path, NETS[name](), extra_options=extra, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip
    found = trace(data, source(name))
    assert found.not_compared is None
    assert messages(found) == ""
    assert found.flipped == 0
    assert {x.rounded_at_load for x in found.layers} == {"AddQDQPairToWeight" in extra}


def test_a_batchnorm_may_be_folded_before_quantizing_or_stay_in_the_file(tmp_path):
    model = float_model(batchnorm_net())
    kept = by_the_runtime(
        tmp_path, batchnorm_net(), per_channel=True,
        op_types_to_quantize=["Conv", "Relu", "GlobalAveragePool", "Gemm"],
    )  # fmt: skip
    assert "BatchNormalization" in {node.op_type for node in parse(kept).graph}
    for data in (kept, by_the_runtime(tmp_path, model.onnx, per_channel=True)):
        found = trace(data, model)
        assert messages(found) == ""
        assert [layer.name for layer in found.layers] == ["conv0", "conv1", "fc"]
        assert found.flipped == 0
        assert found.steps <= 0.501


def test_flips_behind_a_batchnorm_that_stays_in_the_file_are_undone_on_its_grid(tmp_path):
    model = float_model(batchnorm_net())
    data = by_the_runtime(
        tmp_path, batchnorm_net(), op_types_to_quantize=["Conv"], weight_type=QuantType.QInt8
    )
    name = "conv1.weight_quantized"
    codes = initializers(data)[name].copy()
    codes.flat[::5] -= np.sign(codes.flat[::5])
    tampered = with_constants(data, {name: codes})
    assert tampered is not None
    found = trace(tampered, model)
    assert {x.name for x in found.layers if x.flipped} == {"conv1"}
    assert 0.15 < found.layers[1].flipped <= 0.2
    assert found.nearest is not None
    np.testing.assert_array_equal(initializers(found.nearest)[name], initializers(data)[name])


def test_true_four_bit_weights_of_another_maker(tmp_path):
    data = by_the_runtime(
        tmp_path, source("plain").onnx, weight_type=QuantType.QInt4, per_channel=True
    )
    found = trace(data, source("plain"))
    if found.not_compared is None:
        assert found.flipped == 0
        assert {layer.storage for layer in found.layers} == {"int4"}
    else:
        assert "com.microsoft" in found.not_compared


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
    assert not found.differences
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
    [(np.zeros(8, np.float32), "positive"), (np.ones(3, np.float32), "scales")],
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


def test_a_bias_that_is_computed_from_the_image_is_told(ours):
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
    assert "bias of 'block' is computed in the file" in messages(found)
    assert not found.same_network


def test_an_input_that_only_the_file_has_is_told():
    """Of a node that holds no layer: a product of two activations."""

    def data(extra: bool) -> bytes:
        net = Net(seed=3)
        x = net.node("Flatten", net.node("GlobalAveragePool", net.x))
        x = net.node("Gemm", x, net.weight(3, 10, name="a.weight"))
        turned = net.node("Softmax", x)
        gram = net.node("Gemm", turned, x, *[x] * extra, transA=1)
        return net.model(net.node("MatMul", x, gram))

    model = float_model(data(extra=False))
    assert not trace(data(extra=False), model).differences
    assert "has an input in one of source and file only" in messages(trace(data(extra=True), model))


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


def test_a_file_of_quantized_operators_is_not_compared(tmp_path):
    data = by_the_runtime(tmp_path, plain_net(), quant_format=QuantFormat.QOperator)
    found = trace(data, source("plain"))
    assert found.not_compared is not None
    assert "QLinear" in found.not_compared
    assert found.layers == ()
    assert not found.same_network


def test_no_file_at_all_is_not_compared():
    assert "not an ONNX file" in (trace(b"no model", source("plain")).not_compared or "")


def test_integer_arithmetic_between_the_pair_is_not_compared(ours):
    def move(graph: ir.Graph) -> None:
        quantize_node = node_of(graph, "block:out.quantize")
        turn = ir.node("Identity", [quantize_node.outputs[0]], name="turn")
        insert_behind(graph, quantize_node, turn)

    assert "integers" in (trace(changed(ours, move), source("residual")).not_compared or "")


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
