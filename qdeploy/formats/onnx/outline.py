"""A graph without its weights: functions inlined, shapes inferred for a batch that can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.inliner

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.onnx.tensors import is_external, size, values

PROBE = 7919  # a prime that is no size of a network: a dimension it divides runs over the batch
SMALL = 1024  # values; constants that shapes are computed with
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """Nodes in order, what is known of shapes, and the constants that are small."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]  # those that have a batch, which is not fixed
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]  # with `PROBE` for the batch; None where a size is not known
    constants: Mapping[str, np.ndarray]
    stored: Mapping[str, int]  # values of every constant, small or not
    opset: int


def outline(proto: onnx.ModelProto) -> Outline:
    """What `proto` computes with shapes. It must have passed the limits on size."""
    light, stored = _without_weights(proto)
    inputs = _probe(light.graph, stored)
    try:
        with foreign_reader("shapes"):
            if light.functions:
                light = onnx.inliner.inline_local_functions(light)
            light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except InputError:
        pass  # as much as is known then: what the graph breaks is said by ONNX's own check
    graph = light.graph
    known = [*graph.input, *graph.value_info, *graph.output]
    shapes = {value.name: found for value in known if (found := _shape(value)) is not None}
    shapes.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.output:
            tensor = _constant(node.attribute[0])
            if tensor is not None:
                constants[node.output[0]] = tensor
                stored.setdefault(node.output[0], size(tensor))
    small = {name: held for name, t in constants.items() if (held := values(t)) is not None}
    opset = max((e.version for e in proto.opset_import if e.domain in {"", "ai.onnx"}), default=0)
    outputs = tuple(value.name for value in graph.output)
    return Outline(tuple(graph.node), inputs, outputs, shapes, small, stored, opset)


def per_image(shape: Shape) -> int:
    """The values of a tensor for one image; sizes that are not known count as 1."""
    found = 1
    for dim in shape:
        whole = 1 if dim is None else dim
        found = min(found * max(whole // PROBE if whole % PROBE == 0 else whole, 1), 1 << 62)
    return found


def _without_weights(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name or "graph"
    graph.input.extend(proto.graph.input)
    for value in proto.graph.output:
        graph.output.add(
            name=value.name
        ).type.tensor_type.elem_type = value.type.tensor_type.elem_type
    stored: dict[str, int] = {}
    given = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        stored[tensor.name] = size(tensor)
        if stored[tensor.name] <= SMALL and not is_external(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            _as_input(graph, tensor.name, tensor)
    for node in proto.graph.node:
        large = [a.t for a in node.attribute if a.HasField("t") and size(a.t) > SMALL]
        if node.op_type == "Constant" and large and node.output:
            stored[node.output[0]] = size(large[0])
            _as_input(graph, node.output[0], large[0])
        else:
            graph.node.append(node)
    return light, stored


def _as_input(graph: onnx.GraphProto, name: str, tensor: onnx.TensorProto) -> None:
    kind = graph.input.add(name=name).type.tensor_type
    kind.elem_type = tensor.data_type
    for dim in tensor.dims:
        kind.shape.dim.add(dim_value=dim)


def _probe(graph: onnx.GraphProto, stored: Mapping[str, int]) -> tuple[str, ...]:
    """Give every input that takes any batch one of `PROBE` images."""
    found = []
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in stored and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = PROBE
            found.append(value.name)
    return tuple(found)


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)


def _constant(attribute: onnx.AttributeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node, in whichever way it is written."""
    if attribute.HasField("t"):
        return attribute.t
    whole = {"value_int": [attribute.i], "value_ints": attribute.ints}.get(attribute.name)
    if whole is None:
        return None
    dims = [] if attribute.name == "value_int" else [len(whole)]
    return onnx.TensorProto(data_type=onnx.TensorProto.INT64, dims=dims, int64_data=whole)
