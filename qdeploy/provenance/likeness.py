"""When two nodes of different graphs are the same operation, and two constants the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qdeploy.formats.onnx.tensors import constant

NOISE = 1e-4  # of a constant's largest value: another order of float operations
FEWEST_STEPS = 15  # of a grid of 4 bits
WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm"})
ALL_ONES = frozenset({"strides", "dilations"})


def alike(source: ir.Node, file: ir.Node) -> bool:
    """The same operator, on constants where the other has constants."""
    if flattens(source) and flattens(file):
        return True
    counted = 2 if source.op_type in WITH_BIAS or by_a_matrix(source) else None
    kinds = [
        [None if v is None else v.is_initializer() for v in node.inputs[:counted]]
        for node in (source, file)
    ]
    same = (source.domain, source.op_type) == (file.domain, file.op_type)
    return (same or (by_a_matrix(source) and by_a_matrix(file))) and kinds[0] == kinds[1]


def by_a_matrix(node: ir.Node) -> bool:
    """A product of rows by a constant matrix, whichever of its operators does it."""
    if node.op_type not in {"Gemm", "MatMul"}:
        return False
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return False
    rows = node.inputs[0].shape if node.inputs[0] is not None else None
    return node.op_type == "Gemm" or (rows is not None and len(rows) == 2)


def matrix(node: ir.Node) -> np.ndarray | None:
    """The constant of a product `by_a_matrix`, with a row per output."""
    held = constant(node.inputs[1])
    if held is None or node.attributes.get_int("transB", 0) == 1:
        return held
    return held.T


def flattens(node: ir.Node) -> bool:
    """Flatten, or a Reshape to one row per image."""
    if node.op_type == "Flatten":
        return node.attributes.get_int("axis", 1) == 1
    shape = constant(node.inputs[1]) if node.op_type == "Reshape" else None
    before = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if shape is None or shape.shape != (2,) or before is None or len(before) < 2:
        return False
    if tuple(shape) == (0, -1):
        return True
    sizes = [size for size in before[1:] if isinstance(size, int)]
    return len(sizes) == len(before) - 1 and int(shape[1]) == int(np.prod(sizes))


def attribute_differences(source: ir.Node, file: ir.Node) -> list[tuple[str, Any, Any]]:
    """Name and both values of every attribute that matters and differs."""
    if flattens(source):
        return []
    want, have = _attributes(source), _attributes(file)
    layout = {"transB"} if by_a_matrix(source) and by_a_matrix(file) else set()
    keys = sorted((want.keys() | have.keys()) - layout)
    return [
        (key, want.get(key, "its default"), have.get(key, "its default"))
        for key in keys
        if not _same(want.get(key), have.get(key))
    ]


def _attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes without those that say what is so anyway."""
    schema = onnx.defs.get_schema(node.op_type, node.version or onnx.defs.onnx_opset_version())
    found = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        known = schema.attributes.get(name)
        default = None
        if known is not None and known.default_value.name:
            default = ir.serde.deserialize_attribute(known.default_value).value
        implied = (
            (name in ALL_ONES and all(v == 1 for v in value))
            or (name == "pads" and not any(value))
            or (name == "kernel_shape" and node.op_type in WITH_BIAS)  # the weight's own
            or _same(value, default)
        )
        if not implied:
            found[name] = value
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-6, atol=0))
    if isinstance(a, ir.TensorProtocol) and isinstance(b, ir.TensorProtocol):
        return np.array_equal(a.numpy(), b.numpy())
    return bool(a == b)


def constants_difference(
    want: np.ndarray, have: np.ndarray, step_of: Callable[[np.ndarray], float]
) -> str | None:
    """How the file's constant is another one than the source's; None if it is the same, or rounded.

    A rounded one may be a step away: its grid's, and never more than one of 4 bits would have.

    Args:
        step_of: Largest step of the grid that the file's values were rounded on, 0 for none.
    """
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"a constant of shape {have.shape} in the file, {want.shape} in the source"
    if want.dtype.kind != "f":
        equal = np.array_equal(want, have)
        return None if equal else f"{_short(have)} in the file, {_short(want)} in the source"
    far = float(np.abs(want - have).max(initial=0))
    span = float(want.max(initial=0) - want.min(initial=0))
    near = NOISE * float(np.abs(want).max(initial=0)) + min(step_of(have), span / FEWEST_STEPS)
    return None if far <= near else f"a constant that is {far:.3g} away from the source's"


def _short(values: np.ndarray) -> str:
    return str(values.tolist()) if values.size <= 8 else f"{values.size} integers"
