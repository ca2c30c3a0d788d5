"""Whether the answer to one image can depend on how many others are in the batch, or on which.

Shapes are inferred for a batch of a large prime, so that a dimension runs over the batch where the
prime divides it, behind a Reshape too. What only says a shape is no value. An error is what
provably mixes images, or lets their number into values; what cannot be followed is left to the
measurement of the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import onnx

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.onnx.batch_flow import (
    ACROSS,
    DYNAMIC,
    FAR,
    IN_VALUES,
    LOST,
    SOURCES,
    Answer,
    Data,
    Sizes,
    State,
    attribute,
    elementwise,
    marked,
    reshaped,
)
from qdeploy.formats.onnx.outline import outline
from qdeploy.formats.onnx.size_values import size_values
from qdeploy.values import Finding

RULES = {
    IN_VALUES: "How many images a batch has becomes part of a value.",
    ACROSS: "An operation mixes the images of a batch, or picks one by its place in it.",
    DYNAMIC: "A scale is taken from all images of a batch together.",
}
TEXTS = {
    IN_VALUES: "lets the number of images in a batch into values",
    ACROSS: "mixes the images of a batch, or picks one by its place in it",
    DYNAMIC: "takes a scale from all images of a batch together",
}
COUNTING = frozenset({
    "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd",
})  # fmt: skip
ALONG_ONE = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "LpNormalization": -1, "TopK": -1}
CHOOSING = {"Split": 0, "GatherElements": 0, "Compress": 0, "Concat": 0}
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Mean", "Sum", "Where", "Equal", "Less",
    "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not", "Xor", "Abs", "Neg", "Sign",
    "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Sin", "Cos", "Tanh", "Floor", "Ceil", "Round",
    "Cast", "CastLike", "Identity", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "Sigmoid",
    "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Mish", "Clip", "Dropout",
    "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip
STAYS_FIRST = frozenset({
    "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool",
    "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "GroupNormalization", "LRN",
    "DepthToSpace", "SpaceToDepth", "Resize", "Upsample", "Pad", "Tile",
})  # fmt: skip
MIXES_ELSEWHERE = frozenset({"GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization"})
SCALES = frozenset({"QuantizeLinear", "DequantizeLinear"})
MOST_COMPUTED = 32  # indexes whose values are looked at, of a graph: each takes milliseconds
Handler = Callable[[onnx.NodeProto, State], Answer]


def batch_axis(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What makes answers depend on the batch; a fixed batch has no neighbours that change."""
    graph = outline(proto)
    if not graph.inputs:
        return
    state = State(graph, dict.fromkeys(graph.inputs, Data(0)))
    for node in graph.nodes:
        flow, rule = _tried(node, state)
        if rule == ACROSS and node.op_type in {"ReduceMax", "ReduceMin"} and _scales(node, state):
            flow, rule = None, DYNAMIC
        for i, name in enumerate(node.output):
            state.flows[name] = None if i and rule == DYNAMIC else flow
        if rule:
            where = node.name or next(iter(node.output), node.op_type)
            text = f"{node.op_type} {where!r} {TEXTS[rule]}"
            yield Finding(rule, "warning" if rule == DYNAMIC else "error", where, text)
    for name in graph.outputs:
        if isinstance(state.flows.get(name), Sizes):
            yield Finding(IN_VALUES, "error", name, f"output {name!r} is the size of the batch")


def _tried(node: onnx.NodeProto, state: State) -> Answer:
    """The answer for a node that may be wrong in any way, which ONNX's own check says."""
    try:
        with foreign_reader("node"):
            return _answer(node, state)
    except InputError:
        return LOST, ""


def _answer(node: onnx.NodeProto, state: State) -> Answer:
    if node.op_type in SOURCES and node.input and node.output:
        return SOURCES[node.op_type](node, state)
    flows = [flow for name in node.input if (flow := state.flows.get(name)) is not None]
    if not flows or not node.output:
        return None, ""
    if node.op_type.startswith("Reduce") or node.op_type in {"ArgMax", "ArgMin"}:
        return _reduce(node, state)
    if node.op_type in ELEMENTWISE:
        return elementwise(node, state)
    handler = HANDLERS.get(node.op_type)
    if handler is not None:
        return handler(node, state)
    return (LOST if any(not isinstance(f, Sizes) for f in flows) else Sizes(None)), ""


def _axes(node: onnx.NodeProto, state: State, index: int = 1) -> list[int] | None:
    """The axes that a node names, from 0; None if they are not known; all if it names none."""
    shape = state.shape(node.input[0])
    if shape is None:
        return None
    name = "axis" if node.op_type in {"ArgMax", "ArgMin"} else "axes"
    axes = state.ints(node, name, index)
    if axes is None and index < len(node.input) and node.input[index]:
        return None
    if not axes:
        keeps = attribute(node, "noop_with_empty_axes", 0)
        axes = [0] if name == "axis" else [] if keeps else list(range(len(shape)))
    return [axis % len(shape) for axis in axes]


def _reduce(node: onnx.NodeProto, state: State) -> Answer:
    given, axes = state.flow(node), _axes(node, state)
    if isinstance(given, Sizes):
        return Sizes(None), ""
    if not isinstance(given, Data) or axes is None:
        return LOST, ""
    if given.axis in axes:
        if given.filled:
            return (Sizes(None) if node.op_type in COUNTING else None), ""
        return LOST, ACROSS
    gone = 0 if attribute(node, "keepdims", 1) else sum(axis < given.axis for axis in axes)
    return Data(given.axis - gone, given.outer, given.inner, given.filled), ""


def _named_axis(node: onnx.NodeProto, state: State, default: int) -> int | None:
    shape = state.shape(node.input[0])
    return None if not shape else int(attribute(node, "axis", default)) % len(shape)


def _along(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    if not isinstance(given, Data):
        return given, ""
    axis = _named_axis(node, state, -1 if state.graph.opset >= 13 else 1)
    return (LOST, ACROSS) if axis == given.axis and not given.filled else (given, "")


def _layer_norm(node: onnx.NodeProto, state: State) -> Answer:
    given, axis = state.flow(node), _named_axis(node, state, -1)
    if not isinstance(given, Data) or axis is None:
        return LOST, ""
    return (LOST, ACROSS) if given.axis >= axis else (given, "")


def _cumsum(node: onnx.NodeProto, state: State) -> Answer:
    given, axes, shape = state.flow(node), state.ints(node, "axis", 1), state.shape(node.input[0])
    if not isinstance(given, Data) or not axes or not shape:
        return given, ""
    if axes[0] % len(shape) != given.axis:
        return given, ""
    return (Sizes(None), "") if given.filled else (LOST, ACROSS)


def _concat(node: onnx.NodeProto, state: State) -> Answer:
    flows = [state.flows.get(name) for name in node.input]
    if not any(isinstance(flow, Sizes) for flow in flows):
        images = [flow for flow in flows if isinstance(flow, Data)]
        axis = _named_axis(node, state, 0)
        if any(flow.axis == axis and not flow.filled for flow in images):
            return LOST, ACROSS
        return elementwise(node, state)
    pieces = []
    for name, flow in zip(node.input, flows, strict=True):
        held = flow.marked if isinstance(flow, Sizes) else None
        shape = state.shape(name)
        if flow is None and shape is not None and None not in shape:
            held = np.zeros(max(math.prod(dim or 0 for dim in shape), 0), bool)
        if held is None:
            return Sizes(None), ""
        pieces.append(held.reshape(-1))
    return marked(np.concatenate(pieces)), ""


def _gather(node: onnx.NodeProto, state: State) -> Answer:
    given, chosen = state.flow(node), state.flow(node, 1)
    index = state.graph.constants.get(node.input[1])
    if isinstance(given, Sizes):
        if given.marked is None or index is None:
            return Sizes(None), ""
        return marked(given.marked[index.reshape(-1)]), ""
    if not isinstance(given, Data):
        return (chosen if given is None else LOST), ""
    axis = _named_axis(node, state, 0)
    if axis == given.axis and not given.filled:
        return _picked(node, state, given) if isinstance(chosen, Sizes) else (LOST, ACROSS)
    rank = None if index is None else index.ndim
    if axis is None or rank is None:
        return LOST, IN_VALUES if isinstance(chosen, Sizes) and not given.filled else ""
    shift = rank - 1 if axis < given.axis else 0
    return Data(given.axis + shift, given.outer, given.inner, given.filled), ""


def _picked(node: onnx.NodeProto, state: State, given: Data) -> Answer:
    """A Gather along the images by an index that is computed from their number (as_strided)."""
    state.computed.add(node.input[1])
    if len(state.computed) > MOST_COMPUTED:
        return LOST, ""
    found = set[tuple[int, int] | None]()
    for batch in (3, 5):
        index = size_values(state.graph, node.input[1], batch)
        if index is None:
            return LOST, ""
        found.add(_in_order(index // given.inner % batch, batch))
    place = found.pop()
    if place is None or found:
        return LOST, ACROSS
    return Data(given.axis + place[0], 1, place[1]), ""


def _in_order(images: np.ndarray, batch: int) -> tuple[int, int] | None:
    """The axis along which every image of a batch comes in its turn, and how often each does."""
    for axis, length in enumerate(images.shape):
        turns = np.repeat(np.arange(batch), length // batch)
        shape = [1] * images.ndim
        shape[axis] = len(turns)
        if len(turns) == length and (images == turns.reshape(shape)).all():
            return axis, length // batch
    return None


def _slice(node: onnx.NodeProto, state: State) -> Answer:
    given, shape = state.flow(node), state.shape(node.input[0])
    starts, ends = state.ints(node, "starts", 1), state.ints(node, "ends", 2)
    steps = state.ints(node, "steps", 4) or [1] * len(starts or ())
    if isinstance(given, Sizes):
        if given.marked is None or not starts or not ends:
            return Sizes(None), ""
        return marked(given.marked[starts[0] : ends[0] : steps[0]]), ""
    if not isinstance(given, Data) or starts is None or shape is None:
        return (given if isinstance(given, Data) else LOST if given else None), ""
    axes = state.ints(node, "axes", 3) or list(range(len(starts)))
    at = [i for i, axis in enumerate(axes) if axis % len(shape) == given.axis]
    if not at or given.filled:
        return given, ""
    whole = starts[at[0]] == 0 and steps[at[0]] == 1 and (ends is None or ends[at[0]] >= FAR)
    return (given, "") if whole else (LOST, ACROSS)


def _chosen(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    if isinstance(given, Data):
        axis = _named_axis(node, state, 0)
        return (LOST, ACROSS) if axis == given.axis and not given.filled else (given, "")
    return (Sizes(None) if isinstance(given, Sizes) else given), ""


def _reshape(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    if isinstance(given, Data):
        return reshaped(given, state.shape(node.input[0]), state.shape(node.output[0]))
    return given, ""


def _transpose(node: onnx.NodeProto, state: State) -> Answer:
    given, shape = state.flow(node), state.shape(node.input[0])
    if not isinstance(given, Data) or shape is None:
        return given if isinstance(given, Sizes) else LOST, ""
    order = list(attribute(node, "perm", range(len(shape))[::-1]))
    return Data(order.index(given.axis), given.outer, given.inner, given.filled), ""


def _product(node: onnx.NodeProto, state: State) -> Answer:
    """A matrix product: it sums over the last axis of its first operand."""
    second = 3 if node.op_type == "QLinearMatMul" else 1
    left, right = state.flow(node), state.flow(node, second)
    if isinstance(left, Sizes) or isinstance(right, Sizes):
        images = [f for f in (left, right) if f is not None and not isinstance(f, Sizes)]
        return (LOST, IN_VALUES) if images else (Sizes(None), "")
    places = []
    for index, flow, summed in ((0, left, -1), (second, right, -2)):
        shape = state.shape(node.input[index])
        if flow is None:
            continue
        if not isinstance(flow, Data) or shape is None or len(shape) < 2:
            return LOST, ""
        turned = node.op_type == "Gemm" and attribute(node, "transB" if index else "transA", 0)
        place = flow.axis - len(shape)
        place = -3 - place if turned else place
        if place == summed:
            return (Sizes(None), "") if flow.filled else (LOST, ACROSS)
        places.append((place, flow))
    if len({place for place, _ in places}) > 1:
        return LOST, ACROSS
    place, flow = places[0]
    rank = len(state.shape(node.output[0]) or ())
    return (Data(place + rank, flow.outer, flow.inner) if rank else LOST), ""


def _first(node: onnx.NodeProto, state: State) -> Answer:
    """Operators for which the images lie along the first axis."""
    given = state.flow(node)
    if not isinstance(given, Data):
        return (LOST if given is not None else None), ""
    if given.axis == 0:
        return given, ""
    spatial = node.op_type in MIXES_ELSEWHERE and given.axis > 1
    dense = node.op_type == "Conv" and given.axis == 1 and attribute(node, "group", 1) == 1
    return LOST, ACROSS if spatial or dense or node.op_type == "GroupNormalization" else ""


def _batchnorm(node: onnx.NodeProto, state: State) -> Answer:
    return (LOST, ACROSS) if attribute(node, "training_mode", 0) else (state.flow(node), "")


def _whole_norm(node: onnx.NodeProto, state: State) -> Answer:
    """MeanVarianceNormalization: over images too, unless it says otherwise."""
    given = state.flow(node)
    over = attribute(node, "axes", [0, 2, 3])
    return (LOST, ACROSS) if isinstance(given, Data) and given.axis in over else (given, "")


def _recurrent(node: onnx.NodeProto, state: State) -> Answer:
    given = state.flow(node)
    runs_along = 0 if attribute(node, "layout", 0) == 0 else 1
    mixed = isinstance(given, Data) and given.axis == runs_along
    return LOST, ACROSS if mixed else ""


def _dynamic(node: onnx.NodeProto, state: State) -> Answer:
    return state.flow(node), DYNAMIC


def _scales(node: onnx.NodeProto, state: State) -> bool:
    """Whether a range goes nowhere but into scales and zero points."""
    readers: defaultdict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for other in state.graph.nodes:
        for i, name in enumerate(other.input):
            readers[name].append((other, i))
    waiting, seen, ends = list(node.output), set[str](), 0
    while waiting:
        for reader, index in readers[waiting.pop()]:
            if reader.op_type in SCALES and index > 0:
                ends += 1
            elif reader.op_type not in (ELEMENTWISE | RESHAPES) - SCALES:
                return False
            elif reader.output[0] not in seen:
                seen.add(reader.output[0])
                waiting.append(reader.output[0])
    return ends > 0 and seen.isdisjoint(state.graph.outputs)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(ALONG_ONE, _along), **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(STAYS_FIRST, _first), **dict.fromkeys(CHOOSING, _chosen), "Concat": _concat,
    "Gather": _gather, "Slice": _slice, "Transpose": _transpose, "CumSum": _cumsum,
    "LayerNormalization": _layer_norm, "RMSNormalization": _layer_norm,
    "BatchNormalization": _batchnorm, "MeanVarianceNormalization": _whole_norm,
    "MatMul": _product, "Gemm": _product, "MatMulInteger": _product, "QLinearMatMul": _product,
    "LSTM": _recurrent, "GRU": _recurrent, "RNN": _recurrent, "DynamicQuantizeLinear": _dynamic,
}  # fmt: skip
