"""Small ONNX classifiers put together node by node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.exporting.exporter import export
from qdeploy.graph.io import serialize
from qdeploy.values import FloatModel, Loaded, Origin


class Net:
    """Collects nodes; every method returns the value that its node computes."""

    def __init__(self, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.x = ir.val("image", dtype=ir.DataType.FLOAT, shape=["N", *shape])
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def node(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)  # type: ignore[arg-type]
        node.name = f"n{len(self.nodes)}"
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, values: np.ndarray, name: str | None = None) -> ir.Value:
        name = name or f"c{len(self.constants)}"
        self.constants.append(ir.val(name, const_value=ir.tensor(values, name=name)))
        return self.constants[-1]

    def weight(self, *shape: int, name: str | None = None) -> ir.Value:
        fan_in = max(int(np.prod(shape[1:])), 1)
        values = self.rng.normal(size=shape) / np.sqrt(fan_in)
        return self.constant(values.astype(np.float32), name)

    def conv(
        self, x: ir.Value, *shape: int, name: str | None = None, **attributes: object
    ) -> ir.Value:
        weight = self.weight(*shape, name=f"{name}.weight" if name else None)
        return self.node("Conv", x, weight, self.weight(shape[0]), **attributes)

    def relu(self, x: ir.Value) -> ir.Value:
        return self.node("Relu", x)

    def head(self, x: ir.Value, features: int, classes: int = 10) -> ir.Value:
        """Global pooling, flattening and a fully connected layer."""
        flat = self.node("Flatten", self.node("GlobalAveragePool", x), axis=1)
        weight = self.weight(classes, features, name="fc.weight")
        return self.node("Gemm", flat, weight, self.weight(classes), transB=1)

    def model(self, logits: ir.Value, classes: int = 10, opset: int = 21) -> bytes:
        logits.shape, logits.dtype = ir.Shape(["N", classes]), ir.DataType.FLOAT
        graph = ir.Graph(
            [self.x], [logits], nodes=self.nodes, initializers=self.constants,
            opset_imports={"": opset}, name="net",
        )  # fmt: skip
        return serialize(ir.Model(graph, ir_version=10))


def residual_net(seed: int = 0) -> bytes:
    """Every kind of layer that runs in integers: residual, strided, dilated, grouped, depthwise."""
    net = Net(seed=seed)
    a = net.relu(net.conv(net.x, 8, 3, 3, 3, name="stem", pads=[1, 1, 1, 1]))
    b = net.conv(a, 8, 8, 3, 3, name="block", pads=[1, 1, 1, 1])
    c = net.relu(net.node("Add", a, b))
    d = net.relu(net.conv(c, 8, 1, 3, 3, name="depthwise", pads=[1, 1, 1, 1], group=8))
    e = net.relu(net.conv(d, 16, 4, 1, 1, name="grouped", group=2))
    f = net.relu(
        net.conv(
            e, 16, 16, 3, 3, name="dilated", pads=[2, 2, 2, 2], dilations=[2, 2], strides=[2, 2]
        )
    )
    return net.model(net.head(f, 16))


def float_model(data: bytes) -> FloatModel:
    """The prepared model, as the export stage makes it."""
    from qdeploy.formats.onnx.reading import parse_proto

    origin = Origin("net.onnx", "0" * 64, "ONNX")
    return export(Loaded(origin, parse_proto(data, "net.onnx"), "onnx"))
