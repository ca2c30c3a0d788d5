"""onnxruntime's fused float operators, rewritten as those of the standard that they were made of.

Its optimizer writes them into files that are saved after optimization, and its tools for
transformers do. What each computes is defined in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np
import onnx
import onnx_ir as ir

from qdeploy.errors import InputError
from qdeploy.formats.onnx.integer_operators import MICROSOFT

ACTIVATIONS = frozenset({"", "Relu", "Tanh", "Sigmoid", "LeakyRelu", "Clip", "HardSigmoid"})
OF_FUSION = frozenset({
    "activation", "activation_params", "activation_alpha", "activation_beta", "activation_gamma",
})  # fmt: skip
FIRST_LAYER_NORMALIZATION = 17  # the opset
TANH_GELU = (math.sqrt(2 / math.pi), 0.044715)

Inputs = Sequence[ir.Value | None]


def standard(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The same network in operators of the standard; `proto` itself if it has no fused ones.

    Raises:
        InputError: a fused operator is used in a way that is not known.
    """
    if not any(is_fused(node.domain, node.op_type) for node in proto.graph.node):
        return proto
    model = ir.serde.deserialize_model(proto)
    to_standard(model.graph, where)
    return ir.to_proto(model)


def is_fused(domain: str, op_type: str) -> bool:
    """Whether it is one of those that are rewritten here."""
    return domain == MICROSOFT and op_type in _WAYS


def to_standard(graph: ir.Graph, where: str) -> None:
    """Rewrite a graph in place.

    Raises:
        InputError: a fused operator is used in a way that is not known.
    """
    numbers = count()
    for node in list(graph):
        if is_fused(node.domain, node.op_type):
            _Fused(graph, node, where, numbers).unfuse()


class _Fused:
    """One node that is to be taken apart."""

    def __init__(self, graph: ir.Graph, node: ir.Node, where: str, numbers: count[int]) -> None:
        self.graph, self.node, self.where, self.numbers = graph, node, where, numbers
        self.made: list[ir.Node] = []

    def unfuse(self) -> None:
        old = self.node.outputs[0]
        if any(output.uses() or output.is_graph_output() for output in self.node.outputs[1:]):
            raise self.refused("gives more than its result")
        last = _WAYS[self.node.op_type](self)
        self.graph.insert_before(self.node, self.made)
        last.shape, last.type = old.shape, old.type
        name = old.name
        old.replace_all_uses_with(last, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        last.name = name

    def given(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def needed(self, index: int) -> ir.Value:
        value = self.given(index)
        if value is None:
            raise self.refused(f"lacks its input {index}")
        return value

    def add(self, op_type: str, *inputs: ir.Value | float | None, **attributes: object) -> ir.Value:
        """A new node, with numbers as constants."""
        operands: Inputs = [self._constant(i) if isinstance(i, float) else i for i in inputs]
        new = ir.node(op_type, operands, attributes)  # type: ignore[arg-type]
        new.name = new.outputs[0].name = f"{self.node.outputs[0].name}:part {next(self.numbers)}"
        self.made.append(new)
        return new.outputs[0]

    def activated(self, value: ir.Value, name: str, parameters: Sequence[float]) -> ir.Value:
        """What a fused activation makes of a value."""
        match name, parameters:
            case "", _:
                return value
            case (("Relu" | "Tanh" | "Sigmoid"), _):
                return self.add(name, value)
            case "LeakyRelu", [alpha, *_]:
                return self.add(name, value, alpha=float(alpha))
            case "HardSigmoid", [alpha, beta, *_]:
                return self.add(name, value, alpha=float(alpha), beta=float(beta))
            case "Clip", [low, high, *_]:
                return self.add(name, value, float(low), float(high))
        raise self.refused(f"has activation {name!r} with {len(parameters)} parameters")

    def text(self, name: str) -> str:
        attribute = self.node.attributes.get(name)
        return attribute.as_string() if attribute is not None else ""

    def numbers_of(self, name: str) -> Sequence[float]:
        attribute = self.node.attributes.get(name)
        return tuple(attribute.as_floats()) if attribute is not None else ()

    def number(self, name: str, default: float) -> float:
        return self.node.attributes.get_float(name, default)

    def plain(self) -> Mapping[str, ir.Attr]:
        """The attributes of the operator before its fusion."""
        return {k: a for k, a in self.node.attributes.items() if k not in OF_FUSION}

    def refused(self, what: str) -> InputError:
        return InputError(f"model {self.where}: {self.node.op_type} {self.node.name!r} {what}")

    def _constant(self, number: float) -> ir.Value:
        name = f"{self.node.outputs[0].name}:number {next(self.numbers)}"
        value = ir.val(name, const_value=ir.tensor(np.array(number, np.float32), name=name))
        self.graph.register_initializer(value)
        return value


def _conv(fused: _Fused) -> ir.Value:
    operands = [fused.needed(0), fused.needed(1), fused.given(2)]
    value = fused.add("Conv", *operands, **fused.plain())
    more = fused.given(3)
    value = value if more is None else fused.add("Add", value, more)
    return fused.activated(value, fused.text("activation"), fused.numbers_of("activation_params"))


def _gemm(fused: _Fused) -> ir.Value:
    value = fused.add("Gemm", fused.needed(0), fused.needed(1), fused.given(2), **fused.plain())
    name = fused.text("activation")
    if name == "Clip":
        raise fused.refused("has activation 'Clip'")
    parameters = (fused.number("activation_alpha", 0.01), fused.number("activation_beta", 0.5))
    return fused.activated(value, name, parameters)


def _gelu(fused: _Fused) -> ir.Value:
    bias = fused.given(1)
    x = fused.needed(0)
    return _exact_gelu(fused, x if bias is None else fused.add("Add", x, bias))


def _exact_gelu(fused: _Fused, x: ir.Value) -> ir.Value:
    share = fused.add("Add", fused.add("Erf", fused.add("Div", x, math.sqrt(2))), 1.0)
    return fused.add("Mul", fused.add("Mul", x, share), 0.5)


def _fast_gelu(fused: _Fused) -> ir.Value:
    x, bias = fused.needed(0), fused.given(1)
    x = x if bias is None else fused.add("Add", x, bias)
    root, cubic = TANH_GELU
    cube = fused.add("Mul", fused.add("Mul", fused.add("Mul", x, x), x), cubic)
    share = fused.add("Tanh", fused.add("Mul", fused.add("Add", x, cube), root))
    return fused.add("Mul", fused.add("Mul", x, fused.add("Add", share, 1.0)), 0.5)


def _quick_gelu(fused: _Fused) -> ir.Value:
    x = fused.needed(0)
    return fused.add(
        "Mul", x, fused.add("Sigmoid", fused.add("Mul", x, fused.number("alpha", 1.702)))
    )


def _skip_layer_normalization(fused: _Fused) -> ir.Value:
    opset = fused.graph.opset_imports.get("", 0)
    if opset < FIRST_LAYER_NORMALIZATION:
        raise fused.refused(f"needs opset {FIRST_LAYER_NORMALIZATION}, and the file has {opset}")
    value = fused.add("Add", fused.needed(0), fused.needed(1))
    bias = fused.given(4)
    value = value if bias is None else fused.add("Add", value, bias)
    epsilon = fused.number("epsilon", 1e-12)
    return fused.add(
        "LayerNormalization", value, fused.needed(2), fused.given(3), axis=-1, epsilon=epsilon
    )


def _matmul(fused: _Fused) -> ir.Value:
    if any(fused.node.attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        raise fused.refused("transposes batches")
    operands = []
    for index, side in enumerate("AB"):
        value = fused.needed(index)
        if fused.node.attributes.get_int(f"trans{side}", 0):
            rank = len(value.shape) if value.shape is not None else None
            if rank is None or rank < 2:
                raise fused.refused("transposes what has no known rank")
            order = [*range(rank - 2), rank - 1, rank - 2]
            value = fused.add("Transpose", value, perm=order)
        operands.append(value)
    product = fused.add("MatMul", *operands)
    alpha = fused.number("alpha", 1.0)
    return product if alpha == 1 else fused.add("Mul", product, alpha)


_WAYS: Mapping[str, Callable[[_Fused], ir.Value]] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_normalization,
}
