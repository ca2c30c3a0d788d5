"""onnxruntime's operators on integers, rewritten as float operators between the standard's pairs.

Its quantizer writes them on request (`QuantFormat.QOperator`, `UseQDQContribOps`) and for types
that an opset does not know; its optimizer fuses pairs to them. `QLinearX(x, ...)` is by definition
QuantizeLinear(X(DequantizeLinear(x), ...)), so that nothing is lost in rewriting.

Source: onnxruntime, docs/ContribOperators.md; ONNX, QLinearConv and QLinearMatMul.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import onnx_ir as ir

from qdeploy.errors import InputError
from qdeploy.formats.onnx.tensors import constant

MICROSOFT = "com.microsoft"
PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class _Signature:
    """Where an operator's inputs are, each followed by its scale and zero point."""

    float_operator: str
    operands: tuple[int, ...]
    result: int  # of the result's scale
    bias: int | None = None
    weight_axis: Literal["first", "last", "gemm"] | None = (
        None  # that scales of operand 2 run along
    )
    one_operand_each: int = 0  # operands from here on, as many as there are
    may_give_floats: bool = False  # where no scale of the result is given


_UNARY = ((0,), 3)
_SIGNATURES: Mapping[tuple[str, str], _Signature] = {
    ("", "QLinearConv"): _Signature("Conv", (0, 3), 6, bias=8, weight_axis="first"),
    ("", "QLinearMatMul"): _Signature("MatMul", (0, 3), 6, weight_axis="last"),
    (MICROSOFT, "QGemm"): _Signature(
        "Gemm", (0, 3), 7, bias=6, weight_axis="gemm", may_give_floats=True
    ),
    (MICROSOFT, "QLinearAdd"): _Signature("Add", (0, 3), 6),
    (MICROSOFT, "QLinearMul"): _Signature("Mul", (0, 3), 6),
    (MICROSOFT, "QLinearSigmoid"): _Signature("Sigmoid", *_UNARY),
    (MICROSOFT, "QLinearLeakyRelu"): _Signature("LeakyRelu", *_UNARY),
    (MICROSOFT, "QLinearSoftmax"): _Signature("Softmax", *_UNARY),
    (MICROSOFT, "QLinearAveragePool"): _Signature("AveragePool", *_UNARY),
    (MICROSOFT, "QLinearGlobalAveragePool"): _Signature("GlobalAveragePool", *_UNARY),
    (MICROSOFT, "QLinearConcat"): _Signature("Concat", (), 0, one_operand_each=2),
}
OPERATORS = frozenset({*_SIGNATURES, *((MICROSOFT, name) for name in PAIR)})
KEEP_VALUES = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather",
    "Identity",
})  # fmt: skip  # they hand on codes of their first input, and make none
LAYOUT = ("channels_last", "opset")  # attributes that float operators do not have

_Grid = tuple[ir.Value, ir.Value | None]  # scale, zero point


def to_pairs(graph: ir.Graph, where: str) -> None:
    """Rewrite a graph in place, nodes in topological order.

    Raises:
        InputError: an operator has another layout than the standard's, or lacks inputs.
    """
    rewriting = _Rewriting(graph, where)
    for node in list(graph):
        rewriting.rewrite(node)


class _Rewriting:
    """One graph, and the grids of the integers that its nodes hand on."""

    def __init__(self, graph: ir.Graph, where: str) -> None:
        self.graph, self.where = graph, where
        self.grids: dict[ir.Value, _Grid] = {}
        self.numbers = count()

    def rewrite(self, node: ir.Node) -> None:
        signature = _SIGNATURES.get((node.domain, node.op_type))
        if signature is not None:
            self._expand(node, signature)
        elif node.op_type in PAIR and node.domain in {"", MICROSOFT}:
            node.domain = ""
            if node.op_type == "QuantizeLinear":
                self.grids[node.outputs[0]] = self._grid(node, 1)
        elif node.domain == "" and node.op_type in KEEP_VALUES and node.inputs:
            codes = node.inputs[0]
            grid = self.grids.get(codes) if codes is not None else None
            if codes is not None and grid is not None:
                floats = self._dequantized(node, codes, grid)
                self._replace(node, node.op_type, [floats, *node.inputs[1:]], grid)

    def _expand(self, node: ir.Node, signature: _Signature) -> None:
        if node.attributes.get_int("channels_last", 0):
            raise self._refused(node, "has its channels last")
        if node.op_type == "QLinearSoftmax" and node.attributes.get_int("opset", 0) < 13:
            raise self._refused(node, "is that of an opset before 13")
        first = signature.one_operand_each
        operands = range(first, len(node.inputs), 3) if first else signature.operands
        grids = [self._grid(node, index + 1) for index in operands]
        floats = []
        for place, (index, grid) in enumerate(zip(operands, grids, strict=True)):
            axis = self._weight_axis(node, signature) if place == 1 else None
            floats.append(self._dequantized(node, self._input(node, index), grid, axis))
        bias = self._optional(node, signature.bias)
        if bias is not None:
            floats.append(self._bias(node, bias, [scale for scale, _ in grids]))
        gives_floats = signature.may_give_floats and not self._optional(node, signature.result)
        result_grid = None if gives_floats else self._grid(node, signature.result)
        self._replace(node, signature.float_operator, floats, result_grid)

    def _replace(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], grid: _Grid | None
    ) -> None:
        """Put a float operator there, and QuantizeLinear behind it where there is a grid."""
        kept = {k: a for k, a in node.attributes.items() if k not in LAYOUT}
        floats = ir.node(op_type, inputs, kept, name=node.name)
        new, last = [floats], floats.outputs[0]
        old = node.outputs[0]
        last.name = f"{old.name}:float"
        if grid is not None:
            rounded = ir.node("QuantizeLinear", [last, *grid], name=f"{node.name}:quantize")
            new.append(rounded)
            last = rounded.outputs[0]
            self.grids[last] = grid
        self.graph.insert_before(node, new)
        if old.is_graph_output():
            last.name, last.shape, last.type = old.name, old.shape, old.type
        old.replace_all_uses_with(last, replace_graph_outputs=True)
        last.name = last.name or f"{old.name}:integers"
        self.graph.remove(node, safe=True)

    def _dequantized(
        self, node: ir.Node, value: ir.Value, grid: _Grid, axis: int | None = None
    ) -> ir.Value:
        scale = constant(grid[0])
        lies_along = {} if axis is None or scale is None or scale.size == 1 else {"axis": axis}
        return self._dequantize(node, [value, *grid], lies_along)

    def _bias(self, node: ir.Node, bias: ir.Value, scales: Sequence[ir.Value]) -> ir.Value:
        """An int32 bias, whose scale is the product of those of the operands."""
        held = [array for scale in scales if (array := constant(scale)) is not None]
        if len(held) != len(scales):
            raise self._refused(node, "computes its scales")
        alpha = np.float32(node.attributes.get_float("alpha", 1.0))
        product = np.prod(np.broadcast_arrays(*held), axis=0, dtype=np.float32) * alpha
        along = {} if product.size == 1 else {"axis": 0}
        product = product.reshape(()) if product.size == 1 else product
        scale = ir.val(f"{node.outputs[0].name}:bias_scale", const_value=ir.tensor(product))
        self.graph.register_initializer(scale)
        return self._dequantize(node, [bias, scale], along)

    def _dequantize(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
    ) -> ir.Value:
        new = ir.node("DequantizeLinear", inputs, attributes)
        new.name = new.outputs[0].name = f"{node.outputs[0].name}:operand {next(self.numbers)}"
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def _weight_axis(self, node: ir.Node, signature: _Signature) -> int | None:
        match signature.weight_axis:
            case "first":
                return 0
            case "last":
                held = constant(self._input(node, 3))
                return None if held is None else held.ndim - 1
            case "gemm":
                return 0 if node.attributes.get_int("transB", 0) else 1
            case None:
                return None

    def _grid(self, node: ir.Node, index: int) -> _Grid:
        return self._input(node, index), self._optional(node, index + 1)

    def _input(self, node: ir.Node, index: int) -> ir.Value:
        value = self._optional(node, index)
        if value is None:
            raise self._refused(node, f"lacks its input {index}")
        return value

    @staticmethod
    def _optional(node: ir.Node, index: int | None) -> ir.Value | None:
        return node.inputs[index] if index is not None and index < len(node.inputs) else None

    def _refused(self, node: ir.Node, what: str) -> InputError:
        return InputError(f"model {self.where}: {node.op_type} {node.name!r} {what}")
