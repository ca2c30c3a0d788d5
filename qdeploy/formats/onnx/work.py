"""How much arithmetic a graph asks for, told from its shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from qdeploy.formats.onnx.outline import PROBE, Outline, Shape, per_image
from qdeploy.values import Finding

RULES = {"too-much-work": "The graph asks for far more arithmetic than classifiers do."}
MOST_WORK = 1 << 44  # multiplications for one image; the largest vision transformers take 2^41
MOST_FOLDED_WORK = 1 << 34  # the same for what depends on no image, which loading works out
POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"})
CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "DeformConv", "QLinearConv"})
RECURRENT = frozenset({"GRU", "LSTM", "RNN"})


def work(found: Outline) -> Iterator[Finding]:
    """Whether loading or running the graph costs beyond reason."""
    read = {name for node in found.nodes for name in node.input}
    made = {name for node in found.nodes for name in node.output}
    varying = read - made - found.stored.keys() - {""}  # the images, of whatever batch
    folded = run = 0
    for node in found.nodes:
        cost = _cost(node, found)
        if varying.isdisjoint(node.input):
            folded += cost
        else:
            varying.update(node.output)
            run += cost
    for total, most, when in (
        (folded, MOST_FOLDED_WORK, "to work out what depends on no image"),
        (run, MOST_WORK, "for one image"),
    ):
        if total > most:
            text = f"asks for {float(total):.2g} multiplications {when}"
            yield Finding("too-much-work", "error", "", text)


def _cost(node: onnx.NodeProto, found: Outline) -> int:
    """Multiplications of one node for one image; sizes that are not known count as 1."""
    made = max((per_image(found.shapes.get(name, ())) for name in node.output), default=1)
    shapes = [found.shapes.get(name, ()) for name in node.input]
    kind = node.op_type
    if kind in PRODUCTS and shapes:
        return made * _inner(node, shapes[0])
    if kind in CONVOLUTIONS and len(shapes) > 1:
        weight = shapes[3] if kind == "QLinearConv" and len(shapes) > 3 else shapes[1]
        return made * per_image(weight[1:])
    if kind == "ConvTranspose" and len(shapes) > 1:
        return per_image(shapes[0]) * per_image(shapes[1][1:])
    if kind in RECURRENT and len(shapes) > 2:
        return per_image(shapes[0][:1]) * (per_image(shapes[1]) + per_image(shapes[2]))
    if kind == "Einsum":
        return _einsum(node, shapes)
    return made * _window(node)


def _inner(node: onnx.NodeProto, shape: Shape) -> int:
    """The length of the sums in a matrix product."""
    if not shape:
        return 1
    flipped = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return per_image((shape[0 if flipped else -1],))


def _window(node: onnx.NodeProto) -> int:
    """How many values of the input go into one of the output, for operators with a window."""
    if node.op_type in POOLS:
        sides = next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), [1])
        return max(math.prod(sides), 1)
    if node.op_type == "LRN":
        return max(next((a.i for a in node.attribute if a.name == "size"), 1), 1)
    return 1


def _einsum(node: onnx.NodeProto, shapes: list[Shape]) -> int:
    """Every index runs over its size, whatever order the runtime finds."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    terms = equation.decode(errors="replace").replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=False):
        for label, size in zip(term, shape, strict=False):
            whole = size or 1
            own = whole // PROBE if whole % PROBE == 0 else whole
            sizes[label] = max(sizes.get(label, 1), own)
    return math.prod(sizes.values())
