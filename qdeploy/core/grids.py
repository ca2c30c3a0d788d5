"""Integer grids: which floats an int4 or int8 tensor can hold, and rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from jaxtyping import Float32, Int32

from qdeploy.errors import ShapeError

SMALLEST_SCALE = np.finfo(np.float32).tiny


class IntType(Enum):
    """The integer types a file stores codes in."""

    INT4 = "int4"
    INT8 = "int8"
    UINT8 = "uint8"
    INT32 = "int32"

    @property
    def bits(self) -> int:
        return int(self.value.lstrip("uint"))

    @property
    def qmin(self) -> int:
        return 0 if self.value.startswith("u") else -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Maps integer codes to floats, channel by channel: `float = (code - zero_point) * scale`.

    `low` and `high` bound the codes in use, which may be fewer than the type that stores them
    can hold: a 4-bit grid is the same numbers whether it is stored as int4 or as int8.
    """

    scale: Float32[np.ndarray, " channels"]  # > 0, units of the tensor per code
    zero_point: Int32[np.ndarray, " channels"]
    low: int
    high: int
    axis: int | None  # dimension of the tensor the channels run along; None: one scale for all

    def __post_init__(self) -> None:
        if not np.all(self.scale > 0) or not np.all(np.isfinite(self.scale)):
            bad = np.count_nonzero(~((self.scale > 0) & np.isfinite(self.scale)))
            raise ShapeError(f"{bad} of {self.scale.size} scales are not positive finite numbers")
        if self.axis is None and self.scale.size != 1:
            raise ShapeError(f"{self.scale.size} scales, but no axis that they run along")

    def along(self, rank: int) -> tuple[int, ...]:
        """Shape that broadcasts one value per channel against a tensor of `rank` dimensions."""
        return tuple(-1 if i == self.axis else 1 for i in range(rank))


def asymmetric_grid(low: float, high: float, dtype: IntType = IntType.UINT8) -> Grid:
    """Grid of one whole activation tensor whose values run from `low` to `high`.

    The range is widened to contain 0, which therefore has a code of its own: padding and ReLU
    stay exact. An empty range gets scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    steps = dtype.qmax - dtype.qmin
    scale = np.float32((high - low) / steps) if high > low else np.float32(1)
    scale = max(scale, SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(dtype.qmin - low / float(scale)), dtype.qmin, dtype.qmax))
    return Grid(
        scale=np.array([scale], np.float32),
        zero_point=np.array([zero_point], np.int32),
        low=dtype.qmin,
        high=dtype.qmax,
        axis=None,
    )


def quantize(x: Float32[np.ndarray, "*shape"], grid: Grid) -> Int32[np.ndarray, "*shape"]:
    """Round `x` onto `grid` exactly as ONNX QuantizeLinear does.

    `code = saturate(round_half_even(x / scale) + zero_point)`, channel by channel.
    A value outside the grid saturates; that is not an error.

    Args:
        x: Finite floats, in the units of the layer.

    Returns:
        Codes in `[grid.low, grid.high]`.

    Raises:
        ShapeError: `grid` has a different number of channels than `x`.
    """
    _check_channels(x.shape, grid)
    shape = grid.along(x.ndim)
    with np.errstate(over="ignore"):  # far outside of the grid: infinite steps saturate too
        steps = np.rint(x / grid.scale.reshape(shape)).astype(np.float64)
    codes = np.clip(steps + grid.zero_point.reshape(shape), grid.low, grid.high)
    return codes.astype(np.int32)


def dequantize(codes: Int32[np.ndarray, "*shape"], grid: Grid) -> Float32[np.ndarray, "*shape"]:
    """The floats that `codes` stand for, exactly as ONNX DequantizeLinear computes them.

    Raises:
        ShapeError: `grid` has a different number of channels than `codes`.
    """
    _check_channels(codes.shape, grid)
    shape = grid.along(codes.ndim)
    steps = (codes - grid.zero_point.reshape(shape)).astype(np.float32)
    return steps * grid.scale.reshape(shape)


def _check_channels(shape: tuple[int, ...], grid: Grid) -> None:
    if grid.axis is None:
        return
    if grid.axis >= len(shape) or shape[grid.axis] != grid.scale.size:
        raise ShapeError(
            f"a tensor of shape {shape} does not have the grid's {grid.scale.size} channels "
            f"along axis {grid.axis}"
        )
