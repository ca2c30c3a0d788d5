"""Small networks, and what quantizers make of them, for the tests of provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    quantize_static,
)

from qdeploy.data import Images
from qdeploy.graph.io import parse, serialize
from qdeploy.provenance.trace import Provenance
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import Rounding
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import FloatModel, Grids, QuantizedModel, QuantPlan
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
