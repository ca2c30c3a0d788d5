from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdeploy.core.grids import IntType
from qdeploy.data import images_from_array
from qdeploy.errors import InputError
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.inner_tensors import open_tap
from qdeploy.quantization.plan import plan_layers
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import ActivationSpec, load_recipe
from qdeploy.values import FloatModel, QuantPlan
from tests.nets import Net, float_model, residual_net


def plan(model: FloatModel) -> QuantPlan:
    return plan_layers(model, load_recipe("int4"), load_device("x86-vnni"))


def every_value(model, images, name):
    x = images.preprocessing.normalise(next(images.batches(len(images))).pixels)
    return open_tap(model.onnx, model.input_name, [name])(x)[name]


def test_minmax_covers_every_value_and_no_more(net, images):
    grids = calibrate(net, plan(net), images, ActivationSpec())
    for name in plan(net).ranged:
        values, grid = every_value(net, images, name), grids.activations[name]
        ends = (np.array([0, 255]) - grid.zero_point) * grid.scale
        assert ends[0] <= min(values.min(), 0) + grid.scale[0]
        assert ends[1] >= values.max() - grid.scale[0]
        assert ends[1] - ends[0] == pytest.approx(
            max(values.max(), 0) - min(values.min(), 0), rel=1e-3
        )


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_the_other_observers_never_widen_a_range(net, images, observer):
    wide = calibrate(net, plan(net), images, ActivationSpec())
    narrow = calibrate(net, plan(net), images, ActivationSpec(observer=observer, percentile=99.0))
    scales = [
        (wide.activations[n].scale[0], narrow.activations[n].scale[0]) for n in plan(net).ranged
    ]
    assert all(narrow <= wide * (1 + 1e-6) for wide, narrow in scales)
    assert any(narrow < 0.97 * wide for wide, narrow in scales)


def test_a_relu_output_has_its_zero_at_code_zero(net, images):
    grids = calibrate(net, plan(net), images, ActivationSpec())
    relus = [name for name in grids.activations if name.startswith("Relu")]
    assert relus
    assert all(grids.activations[name].zero_point[0] == 0 for name in relus)


def test_shared_grids_are_the_same(net, images):
    p = plan(net)
    grids = calibrate(net, p, images, ActivationSpec())
    for tensor, source in p.activations.items():
        assert grids.activations[tensor] is grids.activations[source]


def test_weights_span_their_channel(net, images):
    grids = calibrate(net, plan(net), images, ActivationSpec())
    for grid in grids.weights.values():
        assert (grid.low, grid.high) == (-7, 7)
        assert np.all(grid.scale > 0)


def test_a_constant_image_channel_does_no_harm(net, preprocessing):
    black = images_from_array("black", np.zeros((4, 3, 8, 8), np.uint8), preprocessing)
    grids = calibrate(net, plan(net), black, ActivationSpec())
    assert all(np.isfinite(grid.scale).all() for grid in grids.activations.values())


def test_a_vanishing_channel_gets_a_scale_at_which_its_bias_fits(images):
    """Its weights are all but zero and its bias is not: int32 would overflow at absmax scale."""
    proto = onnx.ModelProto.FromString(residual_net())
    for tensor in proto.graph.initializer:
        if tensor.name == "stem.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[2] *= 1e-20
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    model = float_model(proto.SerializeToString())
    grids = calibrate(model, plan(model), images, ActivationSpec())
    step = grids.weights["stem"].scale * grids.activations[model.input_name].scale[0]
    bias = next(v for k, v in _constants(model).items() if k == "stem.bias")
    assert np.all(np.abs(bias / step) < 2**31)
    assert grids.weights["stem"].scale[2] > 1e-12


def _constants(model):
    from qdeploy.graph.io import initializers

    return initializers(model.onnx)


def test_activations_that_are_not_finite_are_named(preprocessing, images):
    net = Net()
    x = net.node("Sqrt", net.conv(net.x, 4, 3, 3, 3))  # of negative numbers too
    x = net.node("Min", x, net.constant(np.array(1e9, np.float32)))
    data = net.model(net.head(x, 4))
    model = replace(float_model(residual_net()), onnx=_prepared(data))
    with pytest.raises(InputError, match="not finite on calibration images"):
        calibrate(model, plan(model), images, ActivationSpec())


def test_the_image_that_makes_them_so_is_named(preprocessing):
    """One black picture of many, whose norm the model divides by."""
    net = Net()
    black = net.node("Add", net.x, net.constant(np.array(2.0, np.float32)))  # 0 where a pixel is
    axes = net.constant(np.array([1, 2, 3], np.int64))
    norm = net.node("ReduceSum", net.node("Mul", black, black), axes, keepdims=1)
    x = net.conv(net.node("Div", black, norm), 8, 3, 3, 3)
    model = replace(float_model(residual_net()), onnx=_prepared(net.model(net.head(x, 8))))
    pixels = np.random.default_rng(0).integers(1, 256, (40, 3, 8, 8), np.uint8)
    pixels[23] = 0
    one_black = images_from_array("pictures", pixels, preprocessing)
    with pytest.raises(InputError, match="the first of them 'image 23'"):
        calibrate(model, plan(model), one_black, ActivationSpec())


def _prepared(data: bytes) -> bytes:
    """Without the comparison that would already have refused it."""
    from qdeploy.formats.onnx.reading import parse_proto
    from qdeploy.graph.io import serialize
    from qdeploy.graph.prepare import prepare

    return serialize(prepare(parse_proto(data, "net"), opset=21, ir_version=10, where="net"))


def test_weights_only_needs_no_images(net):
    recipe = load_recipe("int4").model_copy(update={"activations": ActivationSpec(bits="none")})
    p = plan_layers(net, recipe, load_device("x86-vnni"))
    assert calibrate(net, p, None, recipe.activations).activations == {}


def test_unsigned_bytes_hold_activations(net, images):
    grids = calibrate(net, plan(net), images, ActivationSpec())
    ends = {(g.low, g.high) for g in grids.activations.values()}
    assert ends == {(IntType.UINT8.qmin, IntType.UINT8.qmax)}
