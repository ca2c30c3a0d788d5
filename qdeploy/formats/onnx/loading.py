"""What onnxruntime rounds itself when it loads a file: float weights between integers.

Its WeightBiasQuantization takes them to be quantized, to nearest and per tensor. What lies between
such a node and the grids it reads and feeds does not keep it from doing so, where other passes
have moved the grids past it before (QDQPropagation), made it part of the node (a bias, a factor, a
BatchNorm) or taken it out (what does nothing).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import onnx

from qdeploy.values import FUSED_AT_LOAD, MOVED_AT_LOAD, ROUNDED_AT_LOAD

Readers = Mapping[str, list[onnx.NodeProto]]
Writers = Mapping[str, onnx.NodeProto]


def rounded_when_loaded(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes that read integers and feed integers, and whose weight is none."""
    listed = [node for node in nodes if node.output]
    readers, writers = readers_of(listed), writers_of(listed)

    def dequantized(name: str) -> bool:
        return name in writers and writers[name].op_type == "DequantizeLinear"

    for node in listed:
        if node.op_type not in ROUNDED_AT_LOAD or len(node.input) < 2:
            continue
        between = dequantized(_moved_from(node.input[0], writers))
        if between and feeds_grid(node, readers, writers) and not dequantized(node.input[1]):
            yield node


def readers_of(nodes: Iterable[onnx.NodeProto]) -> Readers:
    """Who reads each tensor."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            found[name].append(node)
    return found


def writers_of(nodes: Iterable[onnx.NodeProto]) -> Writers:
    """Who writes each tensor."""
    return {name: node for node in nodes for name in node.output}


def feeds_grid(node: onnx.NodeProto, readers: Readers, writers: Writers) -> bool:
    """Whether what a node writes is put on a grid, there or behind what is passed over."""
    seen: set[str] = set()
    left = list(node.output[:1])
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        behind = readers.get(name, [])
        if any(reader.op_type == "QuantizeLinear" for reader in behind):
            return True
        left += [r.output[0] for r in behind if r.output and _passed_over(r, name, writers)]
    return False


def _moved_from(name: str, writers: Writers) -> str:
    """The tensor that nodes which may be passed over have made this one of."""
    seen: set[str] = set()
    while name in writers and name not in seen:
        seen.add(name)
        source = next((n for n in writers[name].input if _computed(n, writers)), "")
        if not _passed_over(writers[name], source, writers):
            break
        name = source
    return name


def _passed_over(node: onnx.NodeProto, given: str, writers: Writers) -> bool:
    """Whether it moves `given`, or is fused, as arithmetic with constants is."""
    if node.op_type in MOVED_AT_LOAD:
        return True
    others = [name for name in node.input if name and name != given]
    return node.op_type in FUSED_AT_LOAD and not any(_computed(n, writers) for n in others)


def _computed(name: str, writers: Writers) -> bool:
    return name in writers and writers[name].op_type != "Constant"
