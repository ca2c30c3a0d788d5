from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from qdeploy.core.grids import IntType
from qdeploy.errors import PlanError
from qdeploy.graph.io import parse
from qdeploy.graph.sites import find_activations, find_sites
from qdeploy.quantization.plan import plan_layers
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import ActivationSpec, GateSpec, Override, Recipe, load_recipe
from qdeploy.settings.waivers import Waiver
from qdeploy.values import FloatModel, QuantPlan
from tests.nets import Net, float_model


def waiver(kind: str, pattern: str) -> Waiver:
    return Waiver(kind=kind, pattern=pattern, owner="o", reason="r", until=date(2999, 12, 31))


def plan(model: FloatModel, device: str = "x86-vnni", **changes: object) -> QuantPlan:
    recipe = load_recipe("int4").model_copy(update=changes)
    return plan_layers(model, recipe, load_device(device))


def test_every_layer_is_planned_in_order(net):
    layers = plan(net).layers
    names = [layer.site.name for layer in layers]
    assert names == ["stem", "block", "depthwise", "grouped", "dilated", "fc"]
    assert {layer.bits for layer in layers} == {4}
    assert {layer.max_code for layer in layers} == {7}
    assert {layer.storage for layer in layers} == {IntType.INT8}
    assert {layer.rounding for layer in layers} == {"efrap-descent"}


@pytest.mark.parametrize(
    ("device", "bits", "max_code", "storage"),
    [
        ("x86-vnni", 8, 127, IntType.INT8),
        ("x86-avx2", 8, 64, IntType.INT8),
        ("x86-avx2", 4, 7, IntType.INT8),
        ("compact", 4, 7, IntType.INT4),
        ("compact", 8, 127, IntType.INT8),
    ],
)
def test_the_device_decides_storage_and_range(net, device, bits, max_code, storage):
    layer = plan(net, device, bits=bits).layers[0]
    assert (layer.max_code, layer.storage) == (max_code, storage)


def test_overrides_change_the_bits_of_the_layers_they_match(net):
    overrides = (Override(layers="*", bits=8), Override(layers="d*", bits=4))
    bits = {layer.site.name: layer.bits for layer in plan(net, overrides=overrides).layers}
    assert bits == {
        "stem": 8, "block": 8, "depthwise": 4, "grouped": 8, "dilated": 4, "fc": 8
    }  # fmt: skip


def test_what_a_layer_reads_can_stay_float(net):
    whole = plan(net)
    read = {use.input for x in whole.layers if x.site.name == "block" for use in x.site.uses}
    kept = plan(net, overrides=(Override(layers="block", activations="none"),))
    assert set(whole.activations) - set(kept.activations) >= read
    assert not read & {*kept.activations, *kept.activations.values()}
    assert [x.bits for x in kept.layers] == [4] * 6


def test_an_override_that_says_nothing_is_an_error():
    with pytest.raises(ValueError, match="gives bits, activations or both"):
        Override(layers="*")


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": (Override(layers="layer7.*", bits=8),)},
        {"gate": GateSpec(waivers=(waiver("float", "layer7.*"),))},
        {"gate": GateSpec(waivers=(waiver("degraded", "layer7.*"),))},
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(net, changes):
    with pytest.raises(PlanError, match=r"'layer7\.\*' matches no layer") as error:
        plan(net, **changes)
    assert "stem" in (error.value.hint or "")


def test_integers_run_from_the_image_to_the_logits(net):
    activations = plan(net).activations
    graph = parse(net.onnx).graph
    outputs = {node.name: node.outputs[0].name for node in graph}
    fused = {outputs[name] for name in ("stem", "Add_1", "depthwise", "grouped", "dilated")}
    assert net.input_name in activations
    assert not fused & set(activations)  # the ReLU behind them runs in the same kernel
    assert outputs["block"] in activations  # read by an addition
    assert net.output_name not in activations


def test_what_only_moves_values_shares_the_grid_of_its_input(net):
    activations = plan(net).activations
    (flat,) = (name for name in activations if name.startswith(("Flatten", "Reshape")))
    assert activations[flat].startswith("GlobalAveragePool")
    assert flat not in plan(net).ranged


def test_weights_only_leaves_activations_alone(net):
    assert plan(net, activations=ActivationSpec(bits="none")).activations == {}


def test_layers_that_cannot_be_quantized_are_named_with_the_reason():
    net = Net()
    x = net.relu(net.conv(net.x, 4, 3, 3, 3, name="stem"))
    x = net.node("ConvTranspose", x, net.weight(4, 4, 2, 2, name="up.weight"))
    model = float_model(net.model(net.head(x, 4)))
    result = plan(model)
    assert [layer.site.name for layer in result.layers] == ["stem", "fc"]
    assert [(layer.name, layer.op_type) for layer in result.left_float] == [("up", "ConvTranspose")]
    assert "no integer kernel" in result.left_float[0].reason


def test_a_computed_weight_is_left_float():
    net = Net()
    x = net.node("Flatten", net.node("GlobalAveragePool", net.conv(net.x, 4, 3, 3, 3, name="stem")))
    square = net.node("MatMul", net.node("Transpose", x, perm=[1, 0]), x)  # two activations
    mixed = net.node("MatMul", net.constant(np.eye(4, dtype=np.float32)), square)
    y = net.node("MatMul", x, mixed)
    model = float_model(net.model(net.node("Gemm", y, net.weight(10, 4), transB=1)))
    assert [layer.reason for layer in plan(model).left_float] == ["its left operand is constant"]


def test_a_model_without_weights_cannot_be_quantized():
    net = Net(shape=(10, 8, 8))
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    with pytest.raises(PlanError, match="no convolution"):
        plan(float_model(net.model(flat)))


def test_a_weight_of_several_nodes_is_one_site():
    net = Net()
    weight = net.weight(3, 3, 1, 1, name="shared.weight")
    x = net.relu(net.node("Conv", net.x, weight, net.weight(3)))
    x = net.relu(net.node("Conv", x, weight))
    graph = parse(float_model(net.model(net.head(x, 3))).onnx)
    sites, left = find_sites(graph)
    assert not left
    assert [len(site.uses) for site in sites] == [2, 1]


def test_constants_of_additions_are_never_rounded():
    """Rounding them would be known in advance, as the rounding of weights is."""
    net = Net()
    x = net.conv(net.x, 4, 3, 3, 3, name="stem")
    offset = net.constant(np.ones((1, 4, 6, 6), np.float32))
    x = net.node("Mul", net.node("Add", x, offset), offset)
    graph = parse(float_model(net.model(net.head(x, 4))).onnx)
    sites, _ = find_sites(graph)
    activations = find_activations(graph, sites)
    constants = set(graph.graph.initializers)
    assert not constants & set(activations)


def test_integers_for_shapes_are_no_activations():
    net = Net()
    x = net.conv(net.x, 4, 3, 3, 3, name="stem")
    size = net.node("Shape", x)
    doubled = net.node("Slice", net.node("Concat", size, size, axis=0), net.constant(np.array([0])),
                       net.constant(np.array([4])))  # fmt: skip
    x = net.node("Reshape", x, doubled)
    graph = parse(float_model(net.model(net.head(x, 4))).onnx)
    sites, _ = find_sites(graph)
    assert all("Concat" not in name for name in find_activations(graph, sites))


def test_a_matrix_and_its_inverse(net, rng):
    for site in (layer.site for layer in plan(net).layers):
        codes = rng.integers(-7, 8, site.shape, dtype=np.int32)
        matrix = site.to_matrix(codes.astype(np.float32)).astype(np.int32)
        assert matrix.shape[0] == site.groups
        np.testing.assert_array_equal(site.from_matrix(matrix), codes)


def test_recipes_can_be_written_without_naming_what_has_a_default():
    recipe = Recipe(schema_version=1, name="r", description="d", bits=4)
    assert recipe.rounding.kind == "efrap"
