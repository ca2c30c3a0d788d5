"""What a tensor message claims and what it holds. Nothing in it is trusted, its name included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from qdeploy.errors import InputError, foreign_reader
from qdeploy.messages.parts import find
from qdeploy.values import Finding

RULES = {
    "false-claim": "A tensor does not hold as many values as its shape claims, or cannot be read.",
    "not-finite": "A constant tensor holds values that are NaN or infinite.",
    "half-precision": "A constant tensor is in 16 bits; it is quantized as float32.",
    "odd-type": "A constant tensor is of a type that image classifiers do not compute in.",
    "string-tensor": "A constant tensor holds text.",
    "denormals": "Many of a tensor's values are too small to be normal numbers.",
}
TYPED_FIELDS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT64: "int64_data",
}
BIT_WIDTHS: dict[int, int] = {
    t.value: t.bitwidth for t in ir.DataType if t not in {ir.DataType.UNDEFINED, ir.DataType.STRING}
}
HALF = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE})
ODD = frozenset({
    onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128,
    onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E4M3FNUZ, onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
})  # fmt: skip
MOST_VALUES = 1 << 62  # stands for all that is more
MOST_DIMENSIONS = 16  # networks use up to 6 (windows of attention), numpy goes to 64
DENORMAL_SHARE = 0.1  # of the values that are not 0; dead channels of honest networks stay below
FEWEST_DENORMALS = 16


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node: of the graph, of local functions, of graphs in nodes and for training."""
    return find(proto, onnx.NodeProto)


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor, wherever in the message it lies.

    Initializers, the values and indices of sparse ones, attributes of nodes, defaults of a local
    function's attributes, graphs in nodes, and instructions for training.
    """
    return find(proto, onnx.TensorProto)


def attached(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """The tensors in a node's own attributes."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def weights(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The constants that may hold weights: scalars of attributes are left out.

    Those are bounds and fill values, for which infinity is usual.
    """
    scalars = {
        id(tensor): tensor  # kept, so that no other message gets its address
        for attribute in find(proto, onnx.AttributeProto)
        for tensor in ([attribute.t] if attribute.HasField("t") else attribute.tensors)
        if size(tensor) <= 1
    }
    yield from (tensor for tensor in all_tensors(proto) if id(tensor) not in scalars)


def size(tensor: onnx.TensorProto) -> int:
    """How many values a tensor claims to hold; `MOST_VALUES` if more than any file can.

    A shape may name millions of dimensions of any size: the product is not let grow.
    """
    found = 1
    for dim in tensor.dims:
        found *= dim
        if not 0 < found < MOST_VALUES:
            return 0 if 0 in tensor.dims else MOST_VALUES
    return found


def stored_bytes(tensor: onnx.TensorProto) -> int | None:
    """How many bytes a tensor of this shape and type takes; None if the type does not say."""
    width = BIT_WIDTHS.get(tensor.data_type)
    return None if width is None else -(-size(tensor) * width // 8)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def values(tensor: onnx.TensorProto) -> np.ndarray | None:
    """The tensor's values; None if they lie elsewhere or cannot be read."""
    if is_external(tensor) or claim(tensor) is not None:
        return None
    try:
        with foreign_reader(""):
            return onnx.numpy_helper.to_array(tensor)
    except InputError:
        return None


def claim(tensor: onnx.TensorProto) -> str | None:
    """What is false about a tensor's claims; None if nothing is."""
    if len(tensor.dims) > MOST_DIMENSIONS:
        return f"tensor {tensor.name!r} has {len(tensor.dims)} dimensions"
    if any(dim < 0 for dim in tensor.dims):
        return f"tensor {tensor.name!r} has shape {tuple(tensor.dims)}"
    claimed, unit = size(tensor), "values"
    if tensor.data_type in TYPED_FIELDS and not tensor.HasField("raw_data"):
        held = len(getattr(tensor, TYPED_FIELDS[tensor.data_type]))
    elif tensor.HasField("raw_data") and tensor.data_type in BIT_WIDTHS:
        held, unit = len(tensor.raw_data), "bytes"
        claimed = stored_bytes(tensor) or 0
    else:
        return None  # the rarer typed fields are compared by whoever reads them
    if held == claimed:
        return None
    return (
        f"tensor {tensor.name!r} claims shape {tuple(tensor.dims)} "
        f"but holds {held} of {claimed} {unit}"
    )


def false_claims(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Tensors whose content is not what they say."""
    for tensor in all_tensors(proto):
        if is_external(tensor):
            continue
        complaint = claim(tensor)
        if complaint is None and values(tensor) is None:
            complaint = f"tensor {tensor.name!r} cannot be read"
        if complaint is not None:
            yield Finding("false-claim", "error", tensor.name, complaint)


def not_finite(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Weights that are no numbers."""
    for tensor in weights(proto):
        held = values(tensor) if tensor.data_type in FLOATS | HALF else None
        bad = 0 if held is None else int(np.count_nonzero(~np.isfinite(held)))
        if held is not None and bad:
            yield Finding(
                "not-finite", "error", tensor.name,
                f"tensor {tensor.name!r} has {bad} of {held.size} values that are NaN or infinite",
            )  # fmt: skip


def half_precision(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Weights in 16 bits, which become 32 before anything is rounded."""
    for tensor in weights(proto):
        if tensor.data_type in HALF:
            yield Finding(
                "half-precision", "warning", tensor.name,
                f"tensor {tensor.name!r} is 16-bit",
            )  # fmt: skip


def odd_tensors(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Weights of unusual types, and weights that are nearly all too small to matter."""
    for tensor in weights(proto):
        name = tensor.name
        if tensor.data_type == onnx.TensorProto.STRING:
            yield Finding("string-tensor", "warning", name, f"tensor {name!r} holds text")
        elif tensor.data_type in ODD:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            yield Finding("odd-type", "warning", name, f"tensor {name!r} is of type {kind}")
        elif tensor.data_type == onnx.TensorProto.FLOAT:
            yield from _denormals(tensor)


def _denormals(tensor: onnx.TensorProto) -> Iterator[Finding]:
    held = values(tensor)
    if held is None:
        return
    magnitudes = np.abs(held[held != 0])
    small = int(np.count_nonzero(magnitudes < np.finfo(np.float32).tiny))
    if small >= FEWEST_DENORMALS and small > DENORMAL_SHARE * magnitudes.size:
        yield Finding(
            "denormals", "warning", tensor.name,
            f"tensor {tensor.name!r}: {small} of {magnitudes.size} values that are not 0 are too"
            " small to be normal numbers, which costs time and can hide data",
        )  # fmt: skip


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of an initializer; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()
