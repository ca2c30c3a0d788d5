"""What the file holds is what was chosen, and what the runtime computes is what we say it does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.core.grids import Grid, dequantize, quantize
from qdeploy.data import Images
from qdeploy.formats.onnx.nodes import operators
from qdeploy.graph.assemble import assemble
from qdeploy.graph.io import cut_to, initializers, parse, serialize
from qdeploy.graph.qdq import stored_codes
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit, wrong_codes
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.runtime.sessions import open_session, optimized
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import EfrapDescent, Nearest, Rounding, Stochastic
from qdeploy.settings.recipe import ActivationSpec, load_recipe
from qdeploy.values import FloatModel, Grids, QuantizedModel, QuantPlan, RoundedLayer
from tests.nets import Net, float_model


def quantized(
    model: FloatModel,
    images: Images,
    *,
    bits: int = 4,
    device: str = "x86-vnni",
    rounding: Rounding = EfrapDescent(),  # noqa: B008 - frozen
    activations: ActivationSpec = ActivationSpec(),  # noqa: B008 - frozen
) -> tuple[QuantizedModel, QuantPlan, Grids]:
    recipe = load_recipe(f"int{bits}").model_copy(
        update={"rounding": rounding, "activations": activations}
    )
    plan = plan_layers(model, recipe, load_device(device))
    grids = calibrate(model, plan, images, recipe.activations)
    rounded = round_layers(RoundingTask(model, plan, grids, images, 0), rounding)
    return emit(model, plan, grids, rounded), plan, grids


def inputs(images: Images) -> np.ndarray:
    return images.preprocessing.normalise(next(images.batches(16)).pixels)


@pytest.mark.parametrize(
    "rounding", [Nearest(), Stochastic(), EfrapDescent()], ids=lambda r: r.kind
)
@pytest.mark.parametrize(("bits", "device"), [(4, "x86-vnni"), (4, "compact"), (8, "x86-avx2")])
def test_the_integers_on_disk_are_the_chosen_ones(net, images, tmp_path, rounding, bits, device):
    result, plan, _ = quantized(net, images, bits=bits, device=device, rounding=rounding)
    path = Path(tmp_path / "model.onnx")
    path.write_bytes(result.onnx)
    assert wrong_codes(path.read_bytes(), plan, result.layers) == 0
    constants = initializers(path.read_bytes())
    for layer in plan.layers:
        codes = stored_codes(constants, layer.site)
        assert codes is not None
        assert np.abs(codes).max() <= layer.max_code
        assert constants[f"{layer.site.weight}.quantized"].dtype.name == layer.storage.value
        assert layer.site.weight not in constants  # no float weights that could be rounded again


def test_a_changed_integer_in_the_file_is_counted(net, images):
    result, plan, _ = quantized(net, images)
    other = replace(result.layers[0], codes=result.layers[0].codes ^ 1)
    changed = int((other.codes != result.layers[0].codes).sum())
    assert wrong_codes(result.onnx, plan, (other, *result.layers[1:])) == changed > 0
    assert wrong_codes(net.onnx, plan, result.layers) == sum(x.codes.size for x in result.layers)


def test_without_optimizations_the_runtime_does_our_arithmetic_node_by_node(net, images):
    """Exactly for rounding; for sums of products up to the order of float additions."""
    result, plan, grids = quantized(net, images)
    graph = parse(result.onnx).graph
    constants = initializers(result.onnx)
    inner = [v.name for node in graph for v in node.outputs]
    session = open_session(cut_to(result.onnx, inner), optimizations="off")
    x = inputs(images)
    values = {**constants, **session.run(x), net.input_name: x}
    checked = Counter[str]()
    for node in graph:
        arrays = [values[v.name] for v in node.inputs if v is not None]
        got = values[node.outputs[0].name]
        checked[node.op_type] += 1
        if node.op_type == "QuantizeLinear":
            np.testing.assert_array_equal(got, quantize(arrays[0], grid_of(arrays, None)))
        elif node.op_type == "DequantizeLinear":
            grid = grid_of(arrays, node.attributes.get_int("axis", 1))
            np.testing.assert_array_equal(got, dequantize(arrays[0].astype(np.int32), grid))
    assert checked["QuantizeLinear"] == len(grids.activations)
    assert checked["DequantizeLinear"] == len(grids.activations) + 2 * len(plan.layers)


def grid_of(arrays: list[np.ndarray], axis: int | None) -> Grid:
    scale = np.atleast_1d(arrays[1])
    zero = (
        np.atleast_1d(arrays[2]).astype(np.int32)
        if len(arrays) > 2
        else np.zeros_like(scale, np.int32)
    )
    low, high = (0, 255) if axis is None else (-(2**31), 2**31 - 1)
    return Grid(scale, zero, low, high, axis if scale.size > 1 else None)


def test_without_optimizations_a_layer_is_integer_arithmetic(net, images):
    """The first convolution and the last product, from their integers, in exact arithmetic."""
    result, plan, grids = quantized(net, images)
    constants = initializers(result.onnx)
    for layer in (plan.layers[0], plan.layers[-1]):
        (use,) = layer.site.uses
        names = [f"{use.input}.quantized", use.output]
        session = open_session(cut_to(result.onnx, names), optimizations="off")
        values = session.run(inputs(images))
        activation, weight = grids.activations[use.input], grids.weights[layer.site.name]
        codes = constants[f"{layer.site.weight}.quantized"].astype(np.int64)
        x = values[names[0]].astype(np.int64) - int(activation.zero_point[0])
        sums = convolved(x, codes) if use.window else x @ codes.T
        sums += constants[f"{use.node}.bias.quantized"].reshape(-1, *[1] * (sums.ndim - 2))
        step = activation.scale[0].astype(np.float64) * weight.scale.astype(np.float64)
        want = sums * step.reshape(-1, *[1] * (sums.ndim - 2))
        np.testing.assert_allclose(values[use.output], want, rtol=1e-4, atol=1e-5)


def convolved(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """3x3 convolution with padding 1, in integers."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_layer_runs_in_an_integer_kernel(net, images, bits):
    result, _, _ = quantized(net, images, bits=bits)
    runs = Counter(operators(optimized(result.onnx)))
    assert runs["com.microsoft.QLinearConv"] + runs["QLinearConv"] == 5
    assert runs["com.microsoft.QLinearAdd"] == 1
    assert runs["com.microsoft.QLinearGlobalAveragePool"] == 1
    assert runs["com.microsoft.QGemm"] == 1
    assert runs["QuantizeLinear"] == 1  # of the image
    assert not {"Conv", "Add", "GlobalAveragePool", "Gemm", "Relu", "DequantizeLinear"} & set(runs)


def test_a_provider_without_integer_kernels_gets_nothing_that_it_cannot_run(net, images):
    """CUDA dequantizes uint8 activations but no int32 biases: constants arrive as floats."""
    result, _, grids = quantized(net, images)
    handed_over = optimized(result.onnx, provider="cuda")
    constants = initializers(handed_over)
    for node in parse(handed_over).graph:
        if node.op_type == "DequantizeLinear":
            assert node.inputs[0] is not None
            assert node.inputs[0].name not in constants
    assert operators(handed_over).count("QuantizeLinear") == len(grids.activations)
    x = inputs(images)
    a, b = (open_session(m, optimizations="off").logits(x) for m in (handed_over, result.onnx))
    np.testing.assert_array_equal(a, b)


def test_optimized_and_unoptimized_answers_agree(net, images):
    result, _, _ = quantized(net, images, bits=8)
    x = inputs(images)
    fast, plain = (open_session(result.onnx, optimizations=o).logits(x) for o in ("all", "off"))
    np.testing.assert_allclose(fast, plain, atol=0.05 * np.abs(plain).max())


def test_the_4_bit_grid_is_the_same_numbers_in_int4_and_in_int8(net, images):
    in_int8, _, _ = quantized(net, images)
    in_int4, _, _ = quantized(net, images, device="compact")
    x = inputs(images)
    a, b = (open_session(m.onnx, optimizations="off").logits(x) for m in (in_int8, in_int4))
    np.testing.assert_array_equal(a, b)
    assert len(in_int4.onnx) < len(in_int8.onnx)


def test_int4_weights_of_a_transformer_stay_int4_in_the_runtime(images):
    """onnxruntime's own kernel for them, MatMulNBits, on our integers: by quantizing no further."""
    net = Net()
    tokens = net.node("Reshape", net.x, net.constant(np.array([0, 3, 64], np.int64)))
    hidden = net.node("Sigmoid", net.node("MatMul", tokens, net.weight(64, 64)))
    hidden = net.node("MatMul", hidden, net.weight(64, 64))
    pooled = net.node("ReduceMean", hidden, net.constant(np.array([1], np.int64)), keepdims=0)
    logits = net.node("Gemm", pooled, net.weight(10, 64, name="fc.weight"), transB=1)
    model = float_model(net.model(logits))
    only = ActivationSpec(bits="none")
    result, _, _ = quantized(model, images, device="compact", activations=only)
    assert operators(optimized(result.onnx)).count("com.microsoft.MatMulNBits") == 2
    x = inputs(images)
    fast, plain = (open_session(result.onnx, optimizations=o).logits(x) for o in ("all", "off"))
    np.testing.assert_allclose(fast, plain, atol=0.01 * np.abs(plain).max())  # 8-bit inputs


def test_only_standard_operators_and_nothing_rounded_at_load_time(net, images):
    result, plan, _ = quantized(net, images)
    model = parse(result.onnx)
    assert set(model.opset_imports) == {""}
    assert model.opset_imports[""] == 21
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0] is not None
            assert not node.inputs[0].is_initializer()
        if node.op_type == "DequantizeLinear":
            bias = node.name is not None and node.name.endswith(".bias.dequantize")
            assert len(node.inputs) == (2 if bias else 3)  # zero points are explicit
    biases = [v for k, v in initializers(result.onnx).items() if k.endswith("bias.quantized")]
    assert len(biases) == len(plan.layers)
    assert {b.dtype.name for b in biases} == {"int32"}


def test_weights_only_keeps_activations_in_float(net, images):
    result, _, _ = quantized(net, images, activations=ActivationSpec(bits="none"))
    assert "QuantizeLinear" not in operators(result.onnx)
    assert operators(result.onnx).count("DequantizeLinear") == 6
    x = inputs(images)
    want, got = open_session(net.onnx).logits(x), open_session(result.onnx).logits(x)
    assert np.square(want - got).mean() < 0.1 * want.var()


def test_a_shared_weight_gets_one_dequantize_linear(images):
    net = Net()
    weight = net.weight(3, 3, 1, 1, name="shared.weight")
    x = net.relu(net.node("Conv", net.x, weight, net.weight(3)))
    x = net.relu(net.node("Conv", x, weight))
    model = float_model(net.model(net.head(x, 3)))
    result, plan, _ = quantized(model, images)
    names = [node.name for node in parse(result.onnx).graph if node.op_type == "DequantizeLinear"]
    assert names.count("shared.weight.dequantize") == 1
    assert len(result.layers[0].bias_corrections) == 2
    assert wrong_codes(result.onnx, plan, result.layers) == 0
    x0 = inputs(images)
    want, got = open_session(model.onnx).logits(x0), open_session(result.onnx).logits(x0)
    assert np.square(want - got).mean() < 0.2 * want.var()


def test_a_prefix_keeps_the_float_weights_of_the_layers_after_it(net, images):
    _, plan, grids = quantized(net, images)
    layers = round_to_nearest(RoundingTask(net, plan, grids, images, 0))
    prefix = serialize(assemble(net, plan, grids, {layers[0].name: layers[0]}))
    constants = initializers(prefix)
    assert "stem.weight.quantized" in constants
    assert "block.weight" in constants
    assert open_session(prefix).logits(inputs(images)).shape == (16, 10)


def test_a_bias_that_does_not_fit_is_an_error(net, images):
    from qdeploy.errors import PlanError

    _, plan, grids = quantized(net, images)
    layers = round_to_nearest(RoundingTask(net, plan, grids, images, 0))
    huge: RoundedLayer = replace(layers[0], bias_corrections=(np.full(8, 1e12),))
    with pytest.raises(PlanError, match=r"'stem': bias .* does not fit into int32"):
        emit(net, plan, grids, (huge, *layers[1:]))


def test_the_same_seed_gives_the_same_bytes(net, images):
    first, again = (quantized(net, images, rounding=Stochastic())[0].onnx for _ in "ab")
    assert first == again
