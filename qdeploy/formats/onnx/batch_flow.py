"""How the images of a batch move through a graph, operator by operator.

Each tensor that has to do with the batch is one of

    Data    has the images along an axis, perhaps among dimensions that were merged with it
    Sizes   is computed from shapes; the values among it that depend on the batch's size are marked
    LOST    comes from the images, which can no longer be told apart
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from qdeploy.formats.onnx.outline import PROBE, Outline, Shape

IN_VALUES, ACROSS, DYNAMIC = "batch-size-in-values", "across-batch", "dynamic-quantization"
FAR = (1 << 31) - 1  # the end of a Slice that means all


@dataclass(frozen=True, slots=True)
class Data:
    axis: int
    outer: int = 1  # what was merged into the axis, before the images and behind them
    inner: int = 1
    filled: bool = False  # one constant everywhere


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    marked: np.ndarray | None  # flat; None if it is not known which


@dataclass(frozen=True, slots=True)
class Lost:
    pass


LOST = Lost()
Flow = Data | Sizes | Lost | None  # None has nothing to do with the batch
Answer = tuple[Flow, str]  # of the outputs, and the rule that is broken, if any


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is known so far."""

    graph: Outline
    flows: dict[str, Flow]
    computed: set[str] = field(default_factory=set)  # indexes whose values were looked at

    def flow(self, node: onnx.NodeProto, index: int = 0) -> Flow:
        return self.flows.get(node.input[index]) if index < len(node.input) else None

    def shape(self, name: str) -> Shape | None:
        return self.graph.shapes.get(name)

    def ints(self, node: onnx.NodeProto, name: str, index: int) -> list[int] | None:
        """Integers that are an attribute in older opsets and an operand in newer ones."""
        given = attribute(node, name, None)
        if given is not None:
            return [given] if isinstance(given, int) else list(given)
        if index < len(node.input) and node.input[index] in self.graph.constants:
            return [int(v) for v in self.graph.constants[node.input[index]].reshape(-1)]
        return None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)  # noqa: TID251


def spread(shape: Shape | None, *, filled: bool = False) -> Flow:
    """Where the batch is in a tensor of this shape, if it was put there whole."""
    axes = [i for i, dim in enumerate(shape or ()) if dim and dim % PROBE == 0]
    if len(axes) > 1:
        return LOST
    axis = axes[0] if axes else 0
    inner = (shape[axis] or PROBE) // PROBE if shape and axes else 1
    return Data(axis, 1, inner, filled)


def marked(sizes: np.ndarray | None) -> Flow:
    return None if sizes is not None and not sizes.any() else Sizes(sizes)


def reshaped(data: Data, before: Shape | None, after: Shape | None) -> Answer:
    """The images keep their order: what lies before and behind them must keep its size."""
    if before is None or after is None or not all(before) or not all(after):
        return LOST, ""
    axes = [i for i, dim in enumerate(after) if dim is not None and dim % PROBE == 0]
    if len(axes) != 1:
        return LOST, ""
    lead = math.prod(d or 1 for d in before[: data.axis]) * data.outer
    tail = math.prod(d or 1 for d in before[data.axis + 1 :]) * data.inner
    first = math.prod(d or 1 for d in after[: axes[0]])
    last = math.prod(d or 1 for d in after[axes[0] + 1 :])
    if lead % first or tail % last:
        return LOST, "" if data.filled else ACROSS
    return Data(axes[0], lead // first, tail // last, data.filled), ""


def _shape_of(node: onnx.NodeProto, state: State) -> Answer:
    shape = state.shape(node.input[0])
    if shape is None or isinstance(state.flow(node), Sizes | None):
        return None, ""
    found = np.array([dim is not None and dim % PROBE == 0 for dim in shape], bool)
    return marked(found[attribute(node, "start", 0) : attribute(node, "end", len(shape))]), ""


def _size_of(node: onnx.NodeProto, state: State) -> Answer:
    return (None if isinstance(state.flow(node), Sizes | None) else Sizes(np.array([True]))), ""


def _filled(node: onnx.NodeProto, state: State) -> Answer:
    if not isinstance(state.flow(node), Sizes):
        return None, ""
    return spread(state.shape(node.output[0]), filled=True), ""


def _expand(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    if given is None and isinstance(state.flow(node, 1), Sizes):
        return spread(state.shape(node.output[0]), filled=True), ""
    if isinstance(given, Data):
        return elementwise(node, state, 1)
    return given, ""


def _range(node: onnx.NodeProto, state: State) -> Answer:
    flows = [state.flow(node, i) for i in range(len(node.input))]
    return (Sizes(None) if any(isinstance(flow, Sizes) for flow in flows) else None), ""


def _nonzero(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    if isinstance(given, Data):
        return (Sizes(None) if given.filled else LOST), ""
    return given, ""


def elementwise(node: onnx.NodeProto, state: State, operands: int | None = None) -> Answer:
    """Operands that are aligned from the right."""
    names = list(node.input)[:operands]
    flows = {name: flow for name in names if (flow := state.flows.get(name)) is not None}
    sizes = [flow for flow in flows.values() if isinstance(flow, Sizes)]
    images = {n: f for n, f in flows.items() if not isinstance(f, Sizes)}
    real = {n: f for n, f in images.items() if not (isinstance(f, Data) and f.filled)}
    if sizes and not real:
        return _joined(sizes), ""
    found, rule = _aligned(node, real or images, state)
    return found, IN_VALUES if sizes else rule


def _joined(sizes: list[Sizes]) -> Flow:
    """Marks of operands; one of another length than the others leaves nothing known."""
    if any(one.marked is None for one in sizes):
        return Sizes(None)
    known = [one.marked for one in sizes if one.marked is not None]
    if len({one.size for one in known if one.size > 1}) > 1:
        return Sizes(None)
    return Sizes(np.logical_or.reduce(np.broadcast_arrays(*known)))


def _aligned(node: onnx.NodeProto, images: Mapping[str, Flow], state: State) -> Answer:
    found: set[tuple[int, int, int]] = set()
    rank = len(state.shape(node.output[0]) or ())
    filled = True
    for name, flow in images.items():
        shape = state.shape(name)
        if not isinstance(flow, Data) or shape is None or not rank:
            return LOST, ""
        filled &= flow.filled
        found.add((flow.axis - len(shape), flow.outer, flow.inner))
    if not found:
        return None, ""
    if len({axis for axis, _, _ in found}) > 1 and not filled:
        return LOST, ACROSS
    if len(found) > 1:
        return LOST, ""
    ((axis, outer, inner),) = found
    return Data(axis + rank, outer, inner, filled), ""


SOURCES: dict[str, Callable[[onnx.NodeProto, State], Answer]] = {
    "Shape": _shape_of, "Size": _size_of, "ConstantOfShape": _filled, "Expand": _expand,
    "Range": _range, "NonZero": _nonzero,
}  # fmt: skip
