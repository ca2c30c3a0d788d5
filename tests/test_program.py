"""The torch evaluation of ONNX graphs, against the runtime that will execute them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
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


def raw(net: Net, logits: ir.Value, opset: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What torch and onnxruntime make of a graph that nothing has prepared."""
    data = net.model(logits, classes=4, opset=opset)
    part = as_program(data).part(["image"], [logits.name])
    (got,) = evaluate(part, {"image": torch.from_numpy(x)}, [logits.name])
    return got.numpy(), open_session(data).logits(x)


UNARY = {
    "Abs": {}, "Elu": {"alpha": 0.7}, "Exp": {}, "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
    "Mish": {}, "Neg": {}, "Softplus": {}, "GlobalMaxPool": {}, "Shape": {"start": 0, "end": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_an_operator_of_one_input_means_here_what_it_means_in_the_standard(name, rng):
    net = Net()
    y = net.node(name, net.x, **UNARY[name])
    if name == "Shape":
        y = net.node("Mul", net.x, net.node("Cast", y, to=1))
    x = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    got, want = raw(net, net.head(y, 3, classes=4), 21, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def number(net: Net, *values: float) -> ir.Value:
    return net.constant(np.array(values, np.float32).reshape(-1, 1, 1))


def whole(net: Net, *values: int) -> ir.Value:
    return net.constant(np.array(values, np.int64))


MANY = {
    "BatchNormalization": lambda n: n.node(
        "BatchNormalization", n.x, *(n.constant(np.float32([1.5, 0.5, 2])) for _ in "1234")
    ),
    "Max": lambda n: n.node("Max", n.x, number(n, 0.1), number(n, 0.2, -1, 0)),
    "Min": lambda n: n.node("Min", n.x, number(n, 0.1)),
    "Mod": lambda n: n.node("Mod", n.x, number(n, 0.3), fmod=1),
    "Mod of sizes": lambda n: n.node("Add", n.x, n.node("Cast", n.node(
        "Mod", n.node("Sub", whole(n, 3), n.node("Shape", n.x, start=3)), whole(n, 7)), to=1)),
    "Slice backwards": lambda n: n.node(
        "Slice", n.x, whole(n, -1, 6), whole(n, -(2**63) + 1, 0), whole(n, 2, 3), whole(n, -1, -2)),
    "ConstantOfShape": lambda n: n.node("Mul", n.x, n.node(
        "ConstantOfShape", n.node("Shape", n.x), value=ir.tensor(np.array([0.5], np.float32)))),
    "ConstantOfShape of zeros": lambda n: n.node("Add", n.x, n.node(
        "ConstantOfShape", n.node("Shape", n.x))),
    "PRelu": lambda n: n.node("PRelu", n.x, number(n, 0.1, 0.2, 0.3)),
    "Pow": lambda n: n.node("Pow", n.node("Abs", n.x), number(n, 1.5)),
    "Sqrt of Log of Reciprocal": lambda n: n.node("Sqrt", n.node("Abs", n.node(
        "Log", n.node("Reciprocal", n.node("Add", n.node("Abs", n.x), number(n, 1)))))),
    "Pad with a value": lambda n: n.node(
        "Pad", n.x, whole(n, 0, 0, 1, 2, 0, 0, 0, 3), n.constant(np.array(0.5, np.float32))),
    "Pad by edges": lambda n: n.node("Pad", n.x, whole(n, 0, 0, 1, 2, 0, 0, 0, 3), mode="edge"),
    "Pad by reflection": lambda n: n.node(
        "Pad", n.x, whole(n, 0, 0, 1, 2, 0, 0, 0, 3), mode="reflect"),
    "Expand": lambda n: n.node("Mul", n.x, n.node("Expand", number(n, 2), whole(n, 3, 8, 8))),
    "Split": lambda n: n.node("Concat", *n.split(num_outputs=3, axis=2), axis=1),
    "ReduceSum": lambda n: n.node("Add", n.x, n.node("ReduceSum", n.x, whole(n, 2, 3))),
    "ReduceMax": lambda n: n.node("Add", n.x, n.node("ReduceMax", n.x, whole(n, -1))),
    "a pair by channel": lambda n: n.pair(
        n.x, np.array([0.1, 0.2, 0.05], np.float32), np.array([3, 0, -5], np.int8), axis=1),
    "a pair with no zero point": lambda n: n.pair(n.node("Abs", n.x), np.float32(0.02), None),
}  # fmt: skip
OLD = {  # axes as an attribute
    "ReduceMean": lambda n: n.node("Add", n.x, n.node("ReduceMean", n.x, axes=[2, 3])),
    "Squeeze": lambda n: n.node("Unsqueeze", n.node("Squeeze", n.node(
        "Unsqueeze", n.x, axes=[1]), axes=[1]), axes=[4]),
}  # fmt: skip


class Maker(Net):
    """With nodes of several outputs, and pairs."""

    def split(self, **attributes: object) -> list[ir.Value]:
        node = ir.node("Split", [self.x], attributes, num_outputs=3)
        for i, value in enumerate(node.outputs):
            value.name = f"part{i}"
        self.nodes.append(node)
        return [
            self.node("ReduceMean", value, self.constant(np.array([2]))) for value in node.outputs
        ]

    def pair(
        self, x: ir.Value, scale: np.ndarray, zero: np.ndarray | None, **axis: int
    ) -> ir.Value:
        grid = [self.constant(np.asarray(scale))]
        grid += [] if zero is None else [self.constant(zero)]
        return self.node(
            "DequantizeLinear", self.node("QuantizeLinear", x, *grid, **axis), *grid, **axis
        )


@pytest.mark.parametrize("name", MANY)
def test_an_operator_of_several_inputs_does_too(name, rng):
    net = Maker()
    y = MANY[name](net)
    channels = 9 if name == "Split" else 3
    x = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    got, want = raw(net, net.head(y, channels, classes=4), 21, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OLD)
def test_axes_of_older_opsets_are_attributes(name, rng):
    net = Maker()
    y = OLD[name](net)
    if name == "Squeeze":
        y = net.node("ReduceMean", y, axes=[4], keepdims=0)
    x = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
    opset = 12 if name == "Squeeze" else 17
    got, want = raw(net, net.head(y, 3, classes=4), opset, x)
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
