"""What a tensor that is computed from shapes holds, for a batch of a given size.

The operators are a short list, run one by one by ONNX's reference implementation, each only after
the size of its result is known to be small: a file may ask for any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.onnx.outline import PROBE, Outline

LONGEST = 64  # nodes that lead to one tensor
LARGEST = 1 << 18  # values of one tensor
ARITHMETIC = frozenset({
    "Add", "Sub", "Mul", "Div", "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Concat",
    "Gather", "Slice",
})  # fmt: skip


def size_values(graph: Outline, name: str, batch: int) -> np.ndarray | None:
    """The values of `name` where `batch` images are given; None where they cannot be told."""
    wanted = _leading_to(graph, name)
    known: dict[str, np.ndarray] = {}
    try:
        for node in wanted or ():
            with foreign_reader("node"):
                found = _value(node, graph, known, batch)
            if found is None:
                return None
            known[node.output[0]] = found
    except InputError:
        return None
    return known.get(name)


def _leading_to(graph: Outline, name: str) -> list[onnx.NodeProto] | None:
    """The nodes that `name` is computed by, in order; None where they are too many."""
    makers = {output: i for i, node in enumerate(graph.nodes) for output in node.output}
    waiting, seen = [name], set[int]()
    while waiting:
        made_by = makers.get(waiting.pop())
        if made_by is None or made_by in seen:
            continue
        seen.add(made_by)
        if graph.nodes[made_by].op_type not in {"Shape", "Size"}:
            waiting.extend(graph.nodes[made_by].input)
    return [graph.nodes[i] for i in sorted(seen)] if len(seen) <= LONGEST else None


def _value(
    node: onnx.NodeProto, graph: Outline, known: Mapping[str, np.ndarray], batch: int
) -> np.ndarray | None:
    if node.output[0] in graph.constants:
        return graph.constants[node.output[0]]
    if node.op_type in {"Shape", "Size"}:
        return _shape_of(node, graph, batch)
    given = {n: known.get(n, graph.constants.get(n)) for n in node.input if n}
    operands = {n: held for n, held in given.items() if held is not None}
    if len(operands) < len(given) or not _small(node.op_type, list(operands.values())):
        return None
    found = ReferenceEvaluator(node, opsets={"": graph.opset}).run(None, operands)
    return np.asarray(next(iter(found)))


def _shape_of(node: onnx.NodeProto, graph: Outline, batch: int) -> np.ndarray | None:
    shape = graph.shapes.get(node.input[0])
    if shape is None or None in shape:
        return None
    real = np.array([d // PROBE * batch if d and d % PROBE == 0 else d for d in shape], np.int64)
    if node.op_type == "Size":
        return np.array(math.prod(int(dim) for dim in real))
    ends = {a.name: a.i for a in node.attribute}
    return real[ends.get("start", 0) : ends.get("end", len(real))]


def _small(op_type: str, operands: list[np.ndarray]) -> bool:
    if op_type == "Range":
        start, stop, step = (float(held.reshape(-1)[0]) for held in operands)
        return step != 0 and (stop - start) / step <= LARGEST
    return op_type in ARITHMETIC and math.prod(max(held.size, 1) for held in operands) <= LARGEST
