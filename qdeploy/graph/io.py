"""ONNX files in and out. What comes in may be hostile; what goes out is reproducible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model
from onnx_ir.passes import common

from qdeploy.errors import InputError, foreign_reader

LARGEST_MODEL_BYTES = (1 << 31) - 1  # a protobuf message cannot be larger
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
TYPED_FIELDS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT64: "int64_data",
}
BIT_WIDTHS: dict[int, int] = {
    t.value: t.bitwidth for t in ir.DataType if t not in {ir.DataType.UNDEFINED, ir.DataType.STRING}
}
QUANTIZATION_OPS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "ConvInteger", "MatMulInteger",
})  # fmt: skip
PRODUCER = "qdeploy"
ModelProto = onnx.ModelProto


def parse_proto(data: bytes, where: str) -> onnx.ModelProto:
    """`data` as an ONNX message, or an error that says it is none.

    Raises:
        InputError: truncated, empty, or something else.
    """
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(f"model {where}: not an ONNX file, or a truncated one") from error
    if not proto.graph.node or not proto.ir_version:
        raise InputError(f"model {where}: not an ONNX file (no graph in it)")
    return proto


def read_untrusted(path: Path) -> onnx.ModelProto:
    """The ONNX model at `path`, float or quantized, checked as far as possible without running it.

    External data must lie inside the model's own folder and be as long as claimed; every tensor
    must hold as many values as its shape claims, all finite; operators are standard ones, without
    control flow.

    Raises:
        InputError: any of this does not hold.
    """
    where = str(path)
    if path.stat().st_size > LARGEST_MODEL_BYTES:
        raise InputError(f"model {where}: larger than {LARGEST_MODEL_BYTES} bytes")
    proto = parse_proto(path.read_bytes(), where)
    _load_external_data(proto, path)
    check(proto, where)
    return proto


def read_single_file(path: Path) -> bytes:
    """The bytes of a model, checked like any untrusted one, that keeps everything in one file.

    Raises:
        InputError: as `read_untrusted`, or it keeps tensors in other files.
    """
    where = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"model {where}: {error.strerror}") from error
    proto = parse_proto(data, where)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _all_tensors(proto)):
        raise InputError(
            f"model {where}: keeps tensors in other files; what is judged must be one file"
        )
    check(proto, where)
    return data


def check(proto: onnx.ModelProto, where: str) -> None:
    """Refuse a model that claims, holds or asks for what a classifier has no business with.

    Raises:
        InputError: as `read_untrusted`.
    """
    for tensor in proto.graph.initializer:
        _check_claims(tensor, where)
    if proto.graph.sparse_initializer:
        raise InputError(f"model {where}: sparse initializers are not supported")
    for node in [*proto.graph.node, *(n for f in proto.functions for n in f.node)]:
        _check_node(node, {f.domain for f in proto.functions}, where)
    with foreign_reader(f"model {where}: fails ONNX's own check"):
        onnx.checker.check_model(proto, full_check=True)
    for tensor in proto.graph.initializer:
        _check_finite(tensor, where)


def refuse_quantized(proto: onnx.ModelProto, where: str) -> None:
    """Rounding twice would not give the integers that were chosen.

    Raises:
        InputError: the model holds quantization operators.
    """
    for node in proto.graph.node:
        if node.op_type in QUANTIZATION_OPS:
            raise InputError(
                f"model {where}: is already quantized ({node.op_type})",
                hint="give the float32 model it was made from; qdeploy validate judges this file",
            )


def to_ir(proto: onnx.ModelProto) -> ir.Model:
    return ir.serde.deserialize_model(proto)


def parse(data: bytes) -> ir.Model:
    """A model that this program wrote or has already checked."""
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(data))


def serialize(model: ir.Model) -> bytes:
    """The model's bytes; equal models give equal bytes."""
    proto = ir.serde.serialize_model(model)
    return proto.SerializeToString(deterministic=True)


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


def operators(data: bytes) -> tuple[str, ...]:
    """The operator of each node, in order; those outside of the standard with their domain."""
    return tuple(
        node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
        for node in parse(data).graph
    )


def identity() -> bytes:
    """The smallest model there is, to find out whether a runtime works at all."""
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT, shape=[1]) for name in "xy")
    node = ir.node("Identity", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="identity")
    return serialize(ir.Model(graph, ir_version=10))


def check_written(model: ir.Model) -> None:
    """Apply ONNX's full check to a model of our own making."""
    common.CheckerPass(full_check=True)(model)


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.resolve().parent
    for tensor in _all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        if not location or not file.is_relative_to(folder):
            raise InputError(
                f"model {path}: tensor {tensor.name!r} points outside of its folder: {location!r}"
            )
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
            size = file.stat().st_size
        except (OSError, ValueError) as error:
            raise InputError(f"model {path}: external data {location!r}: {error}") from error
        if offset < 0 or length < 0 or offset + length > size:
            raise InputError(
                f"model {path}: tensor {tensor.name!r} claims bytes {offset} to {offset + length}"
                f" of {location!r}, which has {size}"
            )
    with foreign_reader(f"model {path}: external data"):
        load_external_data_for_model(proto, str(folder))


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_claims(tensor: onnx.TensorProto, where: str) -> None:
    """A tensor holds as many values as its shape says."""
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"model {where}: tensor {tensor.name!r} has shape {tuple(tensor.dims)}")
    claimed = math.prod(tensor.dims)
    if tensor.data_type in TYPED_FIELDS and not tensor.HasField("raw_data"):
        held = len(getattr(tensor, TYPED_FIELDS[tensor.data_type]))
    elif tensor.HasField("raw_data") and tensor.data_type in BIT_WIDTHS:
        held, claimed = len(tensor.raw_data), -(-claimed * BIT_WIDTHS[tensor.data_type] // 8)
    else:
        return  # the rarer typed fields are compared by onnx's check
    if held != claimed:
        raise InputError(
            f"model {where}: tensor {tensor.name!r} claims shape {tuple(tensor.dims)} "
            f"but holds {held} of {claimed} {'bytes' if tensor.HasField('raw_data') else 'values'}"
        )


def _check_node(node: onnx.NodeProto, local_domains: set[str], where: str) -> None:
    if node.domain not in STANDARD_DOMAINS | local_domains:
        raise InputError(
            f"model {where}: operator {node.domain}.{node.op_type} is not a standard ONNX operator"
        )
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        raise InputError(f"model {where}: control flow ({node.op_type}) is not supported")


def _check_finite(tensor: onnx.TensorProto, where: str) -> None:
    if tensor.data_type in {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}:
        raise InputError(f"model {where}: tensor {tensor.name!r} is 16-bit; export in float32")
    if tensor.data_type not in {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}:
        return
    values = onnx.numpy_helper.to_array(tensor)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(
            f"model {where}: tensor {tensor.name!r} has {bad} of {values.size} values that are "
            "NaN or infinite"
        )
