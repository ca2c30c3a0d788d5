"""ONNX graphs of our own: equal models give equal bytes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qdeploy.messages.encoded import (
    BLOCK,
    SMALLEST_MOVED_BYTES,
    aligned,
    encode,
    in_two,
    joined,
    too_much,
)

PRODUCER = "qdeploy"
WHOLE_BYTES = frozenset({ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT8})


def to_ir(proto: onnx.ModelProto) -> ir.Model:
    return ir.serde.deserialize_model(proto)


def parse(data: bytes) -> ir.Model:
    """A model that this program wrote or has already checked.

    Of a large one the tensors are views of `data`.
    """
    parts = in_two(data)
    if parts is None:
        return ir.serde.deserialize_model(onnx.ModelProto.FromString(data))
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(parts.message))
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            flat = np.frombuffer(parts.block, held.dtype.numpy(), held.size, held.offset or 0)
            shaped = flat.reshape(held.shape.numpy())
            value.const_value = ir.Tensor(shaped, held.dtype, name=held.name)
    return model


def serialize(model: ir.Model) -> bytes:
    """The model's bytes; equal models give equal bytes."""
    if not too_much(constant_bytes(model)):
        return encode(ir.serde.serialize_model(model))
    held: dict[ir.Value, ir.TensorProtocol] = {}
    end = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not _moves(tensor):
            continue
        start = aligned(end)
        end = start + tensor.nbytes
        held[value] = tensor
        shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
        value.const_value = ir.ExternalTensor(
            BLOCK, start, tensor.nbytes, tensor.dtype, shape=shape, name=name
        )
    try:  # the values are not in memory once more
        message = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    finally:
        for value, tensor in held.items():
            value.const_value = tensor
    return joined(message, (tensor.tobytes() for tensor in held.values()))


def _moves(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype in WHOLE_BYTES and tensor.nbytes >= SMALLEST_MOVED_BYTES


def cut_to(data: bytes, outputs: Iterable[str]) -> bytes:
    """The part of the model that computes the tensors `outputs`, which become its outputs."""
    model = parse(data)
    names = tuple(outputs)
    graph = ir.convenience.extract(model.graph, list(model.graph.inputs), list(names))
    graph.opset_imports.update(model.graph.opset_imports)
    return serialize(ir.Model(graph, ir_version=model.ir_version, producer_name=PRODUCER))


def initializers(data: bytes) -> dict[str, np.ndarray]:
    """Every constant tensor of the model by name; int4 codes come one per byte."""
    model = parse(data)
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def constant_bytes(model: ir.Model) -> int:
    """How many bytes the constant tensors of the model take."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def identity() -> bytes:
    """The smallest model there is, to find out whether a runtime works at all."""
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT, shape=[1]) for name in "xy")
    node = ir.node("Identity", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="identity")
    return serialize(ir.Model(graph, ir_version=10))


def check_written(model: ir.Model) -> None:
    """Apply ONNX's full check to a model of our own making."""
    common.CheckerPass(full_check=True)(model)
