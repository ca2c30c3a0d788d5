"""How much a graph may hold, and ask for: each bound is far above what classifiers have.

What goes beyond one is refused before anything else looks at it, so that no rule and no library
spends time or memory on it. Counting is linear in the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx
from google.protobuf.message import Message

from qdeploy.formats.onnx.outline import Outline, outline, per_image
from qdeploy.formats.onnx.tensors import MOST_DIMENSIONS
from qdeploy.formats.onnx.work import RULES as WORK_RULES
from qdeploy.formats.onnx.work import work
from qdeploy.messages.parts import has_unknown_fields, parts, texts
from qdeploy.values import Finding

RULES = {
    **WORK_RULES,
    "too-large": "The graph has more nodes, calls, tensors, sizes or text than classifiers have.",
    "recursive-function": "A local function calls itself, so that it never ends.",
    "huge-tensor": "The graph makes tensors of a size that no classifier needs.",
    "unknown-field": "The file holds parts that ONNX does not know: readers may differ.",
}
# Chosen with room: the largest classifiers are thought to have some thousands of nodes.
MOST_NODES = 20_000  # calls of local functions expanded
MOST_FUNCTIONS = 2_000  # an exporter may keep one for each module
DEEPEST_CALLS = 64  # modules in modules
MOST_TENSORS = 65_536  # three for each node, scales and zero points included
MOST_PARTS = 4_000_000  # messages of any kind: nodes have attributes, values, and texts
LONGEST_NAME_BYTES = 4_096  # exporters make them of paths of modules
MOST_TEXT_BYTES = 1 << 27  # torch notes for each node where in the code it comes from
MOST_DEQUANTIZED = 1 << 29  # 2 GiB of float32; more in files that hold more
MOST_READERS = 2  # of the constants of such a file
MOST_INPUT_VALUES = 1 << 24  # of one image: 3 channels of 2,300 by 2,300 pixels
MOST_INNER_VALUES = 1 << 28  # of one tensor for one image: 1 GiB of float32
FREE_TEXTS = frozenset({"doc_string", "key", "value"})
Function = tuple[str, str]


def limits(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What there is too much of in a model. The rest of the rules may be costly if there is any."""
    found = False
    for finding in _counted(proto):
        found = True
        yield finding
    if not found:
        for finding in _expanded(proto):
            found = True
            yield finding
    if not found:
        known = outline(proto)
        yield from _sizes(known)
        yield from work(known)


def _too_large(where: str, text: str) -> Finding:
    return Finding("too-large", "error", where[:200], text)


def _counted(proto: onnx.ModelProto) -> Iterator[Finding]:
    """One walk over the whole message."""
    most = {"NodeProto": MOST_NODES, "FunctionProto": MOST_FUNCTIONS, "TensorProto": MOST_TENSORS}
    counts: Counter[str] = Counter()
    text, unknown = 0, 0
    for number, part in enumerate(parts(proto)):
        kind = part.DESCRIPTOR.name
        counts[kind] += 1
        if number > MOST_PARTS or counts[kind] > most.get(kind, MOST_PARTS):
            what = kind.removesuffix("Proto").lower()
            yield _too_large("", f"holds more than {most.get(kind, MOST_PARTS)} {what}s")
            return
        if isinstance(part, onnx.TensorProto) and len(part.dims) > MOST_DIMENSIONS:
            yield _too_large(
                part.name, f"tensor {part.name[:80]!r} has {len(part.dims)} dimensions"
            )
        unknown += has_unknown_fields(part)
        free, finding = _text(part)
        text += free
        if finding is not None:
            yield finding
            return
    if text > MOST_TEXT_BYTES:
        yield _too_large("", f"holds {text} bytes of text, more than {MOST_TEXT_BYTES}")
    if unknown:
        yield Finding("unknown-field", "error", "", f"{unknown} parts hold fields unknown to ONNX")


def _text(part: Message) -> tuple[int, Finding | None]:
    """The bytes of free text in one message; a finding if one of its names is too long."""
    free = 0
    for field, text in texts(part):
        if field in FREE_TEXTS:
            free += len(text)
        elif len(text) > LONGEST_NAME_BYTES:
            return free, _too_large(
                "", f"a name ({field}) of {len(text)} characters: {text[:40]!r}"
            )
    return free, None


def _expanded(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Local functions expanded, by arithmetic: a few lines can ask for any number of nodes."""
    bodies = {(f.domain, f.name): f.node for f in proto.functions}
    costs: dict[Function, tuple[int, int]] = {}  # nodes, and depth of calls
    for start in bodies:
        circle = _cost(start, bodies, costs)
        if circle is not None:
            text = f"local function {circle[1]!r} calls itself"
            yield Finding("recursive-function", "error", circle[1], text)
            return
    called = _sum(proto.graph.node, costs)
    nodes, depth = (max(sizes) for sizes in zip(called, *costs.values(), strict=True))
    if nodes > MOST_NODES:
        yield _too_large("", f"is more than {MOST_NODES} nodes once its functions are expanded")
    if depth > DEEPEST_CALLS:
        yield _too_large("", f"functions call functions {depth} deep, more than {DEEPEST_CALLS}")


def _cost(
    start: Function,
    bodies: Mapping[Function, Iterable[onnx.NodeProto]],
    costs: dict[Function, tuple[int, int]],
) -> Function | None:
    """Fill in what `start` and all that it calls cost; the function that calls itself, if any."""
    waiting, open_calls = [start], set[Function]()
    while waiting:
        name = waiting[-1]
        nodes = bodies[name]
        missing = [c for c in map(_callee, nodes) if c in bodies and c not in costs]
        if name in costs or not missing:
            costs.setdefault(name, _sum(nodes, costs))
            open_calls.discard(waiting.pop())
        elif name in open_calls:
            return name
        else:
            open_calls.add(name)
            waiting.extend(dict.fromkeys(missing))
    return None


def _callee(node: onnx.NodeProto) -> Function:
    return node.domain, node.op_type


def _sum(
    nodes: Iterable[onnx.NodeProto], costs: Mapping[Function, tuple[int, int]]
) -> tuple[int, int]:
    called = [costs.get(_callee(node), (0, 0)) for node in nodes]
    total = len(called) + sum(count for count, _ in called)
    return min(total, 1 << 62), 1 + max((depth for _, depth in called), default=0)


def _sizes(found: Outline) -> Iterator[Finding]:
    """Tensors that are made of nothing, or of little, and constants that many nodes unpack."""
    for name in found.inputs:
        values = per_image(found.shapes[name])
        if values > MOST_INPUT_VALUES:
            text = f"input {name!r} takes {values} values, which are no image"
            yield Finding("huge-tensor", "error", name, text)
    dequantized = 0
    for node in found.nodes:
        if node.op_type == "DequantizeLinear" and node.input:
            dequantized += found.stored.get(node.input[0], 0)
        for name in node.output:
            values = _made(node, found) if node.op_type == "Range" else 0
            values = max(values, per_image(found.shapes.get(name, ())))
            if values > MOST_INNER_VALUES:
                text = f"{node.op_type} makes {name!r} of {values} values for one image"
                yield Finding("huge-tensor", "error", name, text)
    held = sum(found.stored.values())
    if dequantized > max(MOST_DEQUANTIZED, MOST_READERS * held):
        text = f"its constants are {dequantized} floats once each reader has unpacked them"
        yield Finding("huge-tensor", "error", "", text)


def _made(node: onnx.NodeProto, found: Outline) -> int:
    """How many values a Range of constants makes; shape inference gives up on floats."""
    bounds = [found.constants.get(name) for name in node.input]
    if len(bounds) != 3 or any(b is None or b.size != 1 for b in bounds):
        return 0
    start, end, step = (float(b.reshape(-1)[0]) for b in bounds if b is not None)
    values = abs((end - start) / step) if step else 0.0
    return int(min(values, 2.0**62)) if not math.isnan(values) else 0
