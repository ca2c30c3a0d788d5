"""The integers a quantized file holds, with the grids that give them a meaning."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32, Int32
from onnx_ir.passes import common

from qdeploy.errors import InputError
from qdeploy.formats.onnx.tensors import constant
from qdeploy.graph.io import parse, serialize

INTEGER = re.compile(r"(u?)int(\d+)")


@dataclass(frozen=True, slots=True, eq=False)
class StoredGrid:
    """Scales and zero points of one QuantizeLinear or DequantizeLinear, as the file has them.

    `float = (code - zero_point) * scale`: one of each for the whole tensor, by channels along
    `axis`, or by blocks of `block` along it.
    """

    scale: Float32[np.ndarray, "*scales"]  # not 0, units of the tensor per code
    zero_point: Int32[np.ndarray, "*scales"]
    axis: int
    block: int  # 0: no blocks
    storage: str  # int4, int8, uint8, ...

    @property
    def least(self) -> int:
        """The lowest code of the type."""
        return _bounds(self.storage)[0]

    @property
    def most(self) -> int:
        """The highest code of the type."""
        return _bounds(self.storage)[1]

    def same_as(self, other: StoredGrid) -> bool:
        """Whether codes mean the same on both."""
        axes_alike = self.scale.size == 1 or (self.axis, self.block) == (other.axis, other.block)
        return (
            axes_alike
            and self.storage == other.storage
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def spread(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """`values`, one per scale, repeated for every element of a tensor of `shape`.

        Raises:
            ValueError: they do not fit.
        """
        if values.size == 1:
            return np.broadcast_to(values.reshape(()), shape)
        axis = self.axis % len(shape)
        if self.block:
            repeated = np.repeat(values, self.block, axis=axis)
            return np.broadcast_to(repeated[tuple(slice(size) for size in shape)], shape)
        along = [-1 if i == axis else 1 for i in range(len(shape))]
        return np.broadcast_to(values.reshape(along), shape)

    def nearest(self, values: Float32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """The codes that QuantizeLinear gives `values`."""
        with np.errstate(over="ignore"):
            steps = np.rint(values / self.spread(self.scale, values.shape)).astype(np.float64)
        codes = steps + self.spread(self.zero_point, values.shape)
        return np.clip(codes, self.least, self.most).astype(np.int32)

    def floats(self, codes: Int32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
        """What `codes` stand for, as DequantizeLinear computes it."""
        steps = codes.astype(np.int64) - self.spread(self.zero_point, codes.shape)
        return steps.astype(np.float32) * self.spread(self.scale, codes.shape)

    @property
    def sha256(self) -> str:
        """Of the little-endian float32 scales, then of as many int32 zero points."""
        data = self.scale.astype("<f4").tobytes() + self.zero_point.astype("<i4").tobytes()
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A constant that a file holds as integers, or as floats that the runtime rounds to some."""

    name: str  # initializer
    held: np.ndarray  # the codes as the file lays them out, in whatever integers
    grid: StoredGrid
    rounded_at_load: bool  # the file holds floats; the codes are what the runtime makes of them

    @property
    def codes(self) -> Int32[np.ndarray, "*shape"]:
        """As the file lays them out."""
        return self.held.astype(np.int32)

    @property
    def values(self) -> Float32[np.ndarray, "*shape"]:
        """What the codes stand for."""
        return self.grid.floats(self.codes)


def read_grid(node: ir.Node, where: str) -> StoredGrid:
    """The grid of a QuantizeLinear or DequantizeLinear.

    Raises:
        InputError: it is computed, not of integers, 0, or does not fit together.
    """
    place = f"model {where}: {node.op_type} {node.name!r}"
    scale = constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] is not None else None
    zero_point = constant(zero)
    if scale is None or (zero is not None and zero_point is None):
        raise InputError(f"{place}: its scale or zero point is computed, not constant")
    if scale.dtype != np.float32 or not np.all((scale != 0) & np.isfinite(scale)):
        raise InputError(f"{place}: its scales are not all float32 numbers other than 0")
    if zero_point is None:
        zero_point = np.zeros(scale.shape, np.int32)
    if zero_point.size != scale.size:
        raise InputError(f"{place}: has {scale.size} scales and {zero_point.size} zero points")
    storage = _storage(node)
    if INTEGER.fullmatch(storage) is None:
        raise InputError(f"{place}: rounds to {storage}, not to integers")
    axis, block = (node.attributes.get_int(key, i) for key, i in (("axis", 1), ("block_size", 0)))
    return StoredGrid(scale, zero_point.astype(np.int32).reshape(scale.shape), axis, block, storage)


def with_constants(data: bytes, constants: Mapping[str, np.ndarray]) -> bytes | None:
    """The same file with other values in some of its constants; None if it lacks one of them.

    Their types stay as they are.
    """
    model = parse(data)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for name, values in constants.items():
        value = model.graph.initializers.get(name)
        old = constant(value)
        if value is None or old is None or old.shape != values.shape:
            return None
        value.const_value = ir.tensor(np.ascontiguousarray(values.astype(old.dtype)), name=name)
    return serialize(model)


def _storage(node: ir.Node) -> str:
    """The integer type a node rounds to, or reads."""
    if node.op_type == "QuantizeLinear":
        asked = node.attributes.get_int("output_dtype", 0)
        if asked:
            return ir.DataType(asked).name.lower()
        typed = node.inputs[2] if len(node.inputs) > 2 else None
    else:
        typed = node.inputs[0]
        maker = typed.producer() if typed is not None else None
        if maker is not None:
            return _storage(maker)
    if typed is None or typed.const_value is None:
        return "uint8"  # the standard's default
    return typed.const_value.dtype.name.lower()


def _bounds(storage: str) -> tuple[int, int]:
    match = INTEGER.fullmatch(storage)
    assert match is not None  # noqa: S101
    bits = int(match[2])
    return (0, 2**bits - 1) if match[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
