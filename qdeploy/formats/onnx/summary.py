"""An ONNX graph in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx

from qdeploy.formats.onnx.reading import holds_integers
from qdeploy.formats.onnx.tensors import all_nodes, size, weights

SHOWN_OPERATORS = 12
Fact = tuple[str, str]


def summary(proto: onnx.ModelProto) -> Iterator[Fact]:
    """Names and what there is to say: who wrote it, its ends, weights by type, operators."""
    graph = proto.graph
    versions = [f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import]
    yield "written by", f"{proto.producer_name} {proto.producer_version}".strip() or "not said"
    yield "opset", f"{', '.join(versions)}; IR {proto.ir_version}"
    stored = {tensor.name for tensor in graph.initializer}
    for what, ends in (("input", graph.input), ("output", graph.output)):
        for value in ends:
            if value.name not in stored:
                yield what, f"{value.name}: {_type(value)}"
    held: Counter[str] = Counter()
    for tensor in weights(proto):
        held[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += size(tensor)
    yield "weights", ", ".join(f"{n:,} {kind}" for kind, n in held.most_common()) or "none"
    yield "quantized", "yes" if holds_integers(proto) else "no"
    counts = Counter(node.op_type for node in all_nodes(proto)).most_common()
    shown = ", ".join(f"{name} {count:,}" for name, count in counts[:SHOWN_OPERATORS])
    more = f" and {len(counts) - SHOWN_OPERATORS} others" if len(counts) > SHOWN_OPERATORS else ""
    yield "operators", f"{sum(count for _, count in counts):,}: {shown}{more}"


def _type(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    sizes = (d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?")
             for d in kind.shape.dim)  # fmt: skip
    return f"{name} ({', '.join(sizes)})"
