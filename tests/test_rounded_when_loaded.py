"""Float weights between integers: onnxruntime rounds them when it loads the file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdeploy.formats.onnx.codes import integer_weights, products_fit
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_to_nearest
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import load_recipe
from tests.nets import Net, float_model

GRAPH = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8, 4, 4] x) => (float[n, 8, 4, 4] y)
<float s = {0.02}, uint8 z = {128}, float low = {0}, float high = {6}, float nought = {0},
 int64[4] same = {-1, 8, 4, 4}, int64[1] one = {1}, int64[1] first = {0}, int64[1] last = {9},
 float[1,8,1,1] bias = {0, 0, 0, 0, 0, 0, 0, 0}, float[8] zeros = {0, 0, 0, 0, 0, 0, 0, 0},
 float[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}, int64[4] sizes = {1, 1, 1, 1}>
{
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    %s
    r = QuantizeLinear (e, s, z)
    y = DequantizeLinear (r, s, z)
}"""
POOL = "<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>"
ROUNDED = {
    "alone": "e = Conv (d, w)",
    "before a ReLU": "c = Conv (d, w) e = Relu (c)",
    "before a Clip": "c = Conv (d, w) e = Clip (c, low, high)",
    "transposed": "e = ConvTranspose (d, w)",
    "a copied weight": "v = Identity (w) e = Conv (d, v)",
    "before a pool": f"c = Conv (d, w) e = MaxPool{POOL} (c)",
    "before a ReLU and a pool": f"c = Conv (d, w) f = Relu (c) e = MaxPool{POOL} (f)",
    "before a pool, transposed": (
        f"c = Conv (d, w) f = MaxPool{POOL} (c) e = Transpose<perm=[0, 1, 3, 2]> (f)"
    ),
    "reshaped": "c = Conv (d, w) e = Reshape (c, same)",
    "longer and shorter": "c = Conv (d, w) f = Unsqueeze (c, one) e = Squeeze (f, one)",
    "a slice of all": "c = Conv (d, w) e = Slice (c, first, last, one)",
    "expanded to itself": "c = Conv (d, w) e = Expand (c, sizes)",
    "cast to itself": "c = Conv (d, w) e = Cast<to=1> (c)",
    "before a Dropout": "c = Conv (d, w) e = Dropout (c)",
    "plus nothing": "c = Conv (d, w) e = Add (c, nought)",
    "a bias of its own": "c = Conv (d, w) e = Add (c, bias)",
    "before a BatchNorm": "c = Conv (d, w) e = BatchNormalization (c, ones, zeros, zeros, ones)",
    "behind a pool": f"p = MaxPool{POOL} (d) e = Conv (p, w)",
    "behind two": f"p = Transpose<perm=[0, 1, 3, 2]> (d) k = MaxPool{POOL} (p) e = Conv (k, w)",
    "reads a sum with nothing": "p = Add (d, nought) e = Conv (p, w)",
}
LEFT = {
    "behind a sigmoid": "c = Conv (d, w) e = Sigmoid (c)",
    "reads floats": "f = Relu (x) e = Conv (f, w)",
    "a mean": f"c = Conv (d, w) e = AveragePool{POOL} (c)",
    "a sum with another": "c = Conv (d, w) e = Add (c, d)",
    "of integers": "i = QuantizeLinear (w, s, z) v = DequantizeLinear (i, s, z) e = Conv (d, v)",
}


def graph(middle: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(GRAPH % middle)
    weight = np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32)
    weight[0] *= 40  # the grid of the whole tensor is the first channel's
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto


def rules(proto: onnx.ModelProto) -> set[str]:
    return {finding.rule for finding in integer_weights(proto)}


def changes_when_loaded(proto: onnx.ModelProto) -> bool:
    """Whether onnxruntime's optimizations move its answers by more than single steps."""
    x = np.random.default_rng(1).normal(size=(16, 8, 4, 4)).astype(np.float32)
    data = proto.SerializeToString()
    plain, fast = (
        open_session(data, optimizations=level).logits(x) for level in ("off", "all")
    )  # fmt: skip
    return float((np.abs(plain - fast) > 0.021).mean()) > 0.05


@pytest.mark.parametrize("middle", ROUNDED.values(), ids=ROUNDED.keys())
def test_what_the_runtime_rounds_is_named(middle):
    proto = graph(middle)
    assert "rounded-when-loaded" in rules(proto)
    assert not products_fit(proto.SerializeToString(), 64)
    assert changes_when_loaded(proto)


@pytest.mark.parametrize("middle", LEFT.values(), ids=LEFT.keys())
def test_what_it_leaves_alone_is_not(middle):
    proto = graph(middle)
    assert "rounded-when-loaded" not in rules(proto)
    assert not changes_when_loaded(proto)


def test_a_layer_that_we_leave_float_is_float_on_the_target_too(images):
    net = Net()
    x = net.relu(net.conv(net.x, 8, 3, 3, 3, name="stem"))
    x = net.relu(net.node("ConvTranspose", x, net.weight(8, 8, 2, 2, name="up.weight")))
    x = net.relu(net.conv(x, 8, 8, 3, 3, name="last"))
    model, device = float_model(net.model(net.head(x, 8))), load_device("x86-vnni")
    recipe = load_recipe("int8")
    plan = plan_layers(model, recipe, device)
    task = RoundingTask(model, plan, calibrate(model, plan, images, recipe.activations), images, 0)
    written = onnx.load_from_string(emit(model, plan, task.grids, round_to_nearest(task)).onnx)
    assert [layer.name for layer in plan.left_float] == ["up"]
    assert "rounded-when-loaded" not in rules(written)
    assert plan.activations
