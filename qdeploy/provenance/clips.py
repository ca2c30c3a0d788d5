"""Where a graph cuts its activations: by Relu, by Clip, and by the ranges of its quantizers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdeploy.formats.onnx.tensors import constant

# A quantizer's range that starts at 0 cuts like a Relu. While the graph of a quantized file is
# prepared, this operator stands for it: nobody else uses it, and no rewriting looks into it.
RANGE_OP = "Shrink"  # lambd: top of the range; bias: one step; both in units of the tensor
NEVER_NEGATIVE = frozenset({
    "Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs", "Sqrt", RANGE_OP,
})  # fmt: skip
KEEP_SIGN = frozenset({
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity", "Dropout",
})  # fmt: skip
KEEP_SIGNS = frozenset({"Add", "Mul", "Concat", "Max"})  # nonnegative if all operands are
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Range:
    """Of a quantizer, from 0 on."""

    top: float
    step: float


@dataclass(frozen=True, slots=True, eq=False)
class Clipped:
    """A tensor as its reader gets it: what a node computes, cut to an interval."""

    base: ir.Value
    low: float = -math.inf
    high: float = math.inf
    ranges: tuple[Range, ...] = ()


def range_mark(value: ir.Value, found: Range) -> ir.Node:
    """The node that stands for a quantizer behind `value`."""
    return ir.node(RANGE_OP, [value], {"lambd": found.top, "bias": found.step})


def unclipped(value: ir.Value) -> Clipped:
    """What is computed before every Relu, Clip and range in front of `value`, and what they cut."""
    low, high = -math.inf, math.inf
    ranges: list[Range] = []
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type == RANGE_OP:
            top, step = (node.attributes.get_float(key, 0.0) for key in ("lambd", "bias"))
            ranges.append(Range(top, step))
        elif (bounds := _bounds(node)) is not None:
            # what is cut later wins where an earlier interval lies outside of it
            low, high = (float(np.clip(bound, low, high)) for bound in bounds)
        else:
            break
        value = node.inputs[0]
    return Clipped(value, low, high, tuple(ranges))


def nonnegative(graph: ir.Graph) -> frozenset[ir.Value]:
    """Tensors of a sorted graph that hold no negative value, whatever the image."""
    found = {v for v in graph.initializers.values() if _is_nonnegative_constant(v)}
    for node in graph:
        bounds = _bounds(node)
        operands = [value in found for value in node.inputs if value is not None]
        if (
            node.op_type in NEVER_NEGATIVE
            or (bounds is not None and bounds[0] >= 0)
            or (node.op_type in KEEP_SIGN | {"Clip"} and any(operands[:1]))
            or (node.op_type in KEEP_SIGNS and all(operands))
            or _pads_with_nothing_negative(node, operands)
        ):
            found.add(node.outputs[0])
    return frozenset(found)


def activation_difference(source: Clipped, file: Clipped, *, positive: bool) -> str | None:
    """How the file's activation is another one than the source's; None if it does the same.

    A quantizer whose range starts at 0 replaces a Relu, and an upper bound that its top is not
    more than a step above. What it cuts besides is its range, and no matter of the graph.

    Args:
        positive: The tensor has no negative values to cut.
    """
    floor = 0.0 if positive else -math.inf
    want, have = max(source.low, floor), max(file.low, floor)
    low_alike = _same(want, have) or (want == 0 and have < 0 and bool(file.ranges))
    tops = [found.top - found.step * (1 + TOLERANCE) for found in file.ranges]
    high_alike = _same(source.high, file.high) or (
        file.high > source.high and any(top <= source.high for top in tops)
    )
    if low_alike and high_alike:
        return None
    return f"{_cut(file)} in the file, {_cut(source)} in the source"


def cuts_at_zero(source: Clipped, file: Clipped, *, positive: bool) -> bool:
    """Whether a quantizer cuts negative values that the source keeps."""
    return bool(file.ranges) and not positive and source.low < 0 and file.low < 0


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """The interval a Relu or Clip cuts to; None for other nodes, and for computed bounds."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        held = constant(value)
        if held is None:
            return None
        bounds[i] = float(held)
    return bounds[0], bounds[1]


def _is_nonnegative_constant(value: ir.Value) -> bool:
    held = constant(value)
    return held is not None and held.dtype.kind == "f" and bool(np.all(held >= 0))


def _pads_with_nothing_negative(node: ir.Node, operands: list[bool]) -> bool:
    if node.op_type != "Pad" or not operands[0]:
        return False
    return (
        len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].name == "" or operands[2]
    )


def _same(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _cut(found: Clipped) -> str:
    if found.low == -math.inf and found.high == math.inf:
        ranges = ", ".join(f"{r.top:.4g}" for r in found.ranges)
        return f"only cut by a quantizer's range of 0 to {ranges}" if ranges else "not cut"
    return f"cut to [{found.low:.4g}, {found.high:.4g}]"
