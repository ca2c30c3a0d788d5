"""The torch evaluation of ONNX graphs, against the runtime that will execute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdeploy.architectures import OURS
from qdeploy.core.program import evaluate
from qdeploy.errors import PlanError
from qdeploy.exporting.exporter import export
from qdeploy.graph.parts import as_program
from qdeploy.runtime.sessions import open_session
from qdeploy.values import FloatModel, Loaded, Origin, Stated
from tests.nets import Net, float_model

SLOW = {"vgg16": pytest.mark.slow}  # has the layers of alexnet, and more of them


def exported(name: str) -> FloatModel:
    torch.manual_seed(0)
    shape = (1, 8, 8) if name == "digits" else (3, 32, 32)
    module = OURS[name]().eval()
    return export(Loaded(Origin("", "", ""), module, "module"), stated=Stated(shape))


def both(model: FloatModel, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    part = as_program(model.onnx).part([model.input_name], [model.output_name])
    (got,) = evaluate(part, {model.input_name: torch.from_numpy(x)}, [model.output_name])
    return got.numpy(), open_session(model.onnx).logits(x)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in sorted(OURS)]
)
def test_every_architecture_computes_what_onnxruntime_computes(name, rng):
    model = exported(name)
    x = rng.normal(size=(3, *model.input_shape)).astype(np.float32)
    got, want = both(model, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_every_kind_of_layer_computes_what_onnxruntime_computes(net, rng):
    got, want = both(net, rng.normal(size=(4, 3, 8, 8)).astype(np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def every_operator() -> bytes:
    """Those that no architecture here has, with the attributes that change what they mean."""
    net = Net()
    x = net.conv(net.x, 4, 3, 3, 3, name="stem", pads=[0, 1, 2, 1])
    x = net.node("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 1])
    x = net.node("Clip", x, net.constant(np.float32(-0.3)), net.constant(np.float32(0.8)))
    x = net.node("MaxPool", x, kernel_shape=[2, 2], pads=[0, 1, 1, 0], strides=[1, 2])
    pieces = [net.node(op, x) for op in ("Sigmoid", "Tanh", "HardSwish", "Erf")]
    x = net.node("Concat", *pieces, net.node("LeakyRelu", x, alpha=0.2), axis=1)
    x = net.node("Sub", x, net.constant(np.float32(0.1)))
    x = net.node("Div", x, net.constant(np.full((1, 20, 1, 1), 1.5, np.float32)))
    x = net.node("Gather", x, net.constant(np.array([3, -1, 0, 7])), axis=1)
    ends = [net.constant(np.array(v)) for v in ([0], [3], [2], [2])]
    x = net.node("Slice", x, *ends)
    return net.model(net.head(x, 4))


def test_operators_keep_the_meaning_of_their_attributes(rng):
    got, want = both(float_model(every_operator()), rng.normal(size=(2, 3, 8, 8)).astype("f4"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_is_run_and_gradients_reach_what_was_given(net, rng):
    program = as_program(net.onnx)
    behind = program.part(["Relu_2:out"], [net.output_name])
    assert len(behind.steps) < len(program.part([net.input_name], [net.output_name]).steps)
    x = torch.from_numpy(rng.normal(size=(2, 3, 8, 8)).astype(np.float32))
    whole = program.part([net.input_name], ["Relu_2:out", net.output_name])
    middle, want = evaluate(whole, {net.input_name: x}, ["Relu_2:out", net.output_name])
    middle = middle.detach().requires_grad_()
    (got,) = evaluate(behind, {"Relu_2:out": middle}, [net.output_name])
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got.square().sum(), middle)
    assert gradient.abs().max() > 0


def test_an_operator_without_a_gradient_here_is_named():
    net = Net()
    x = net.relu(net.conv(net.x, 4, 3, 3, 3, name="stem"))
    model = float_model(net.model(net.head(net.node("Round", x), 4)))
    program = as_program(model.onnx)
    with pytest.raises(PlanError, match="through Round"):
        program.part([model.input_name], [model.output_name])
