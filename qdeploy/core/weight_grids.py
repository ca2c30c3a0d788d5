"""The conventions by which quantizers choose a weight's scale. Attackers have one in mind.

A grid other than the attacker's may by itself keep a backdoor shut: its cells lie elsewhere. Or it
may not, for an attack made for several grids at once. So a rounding is judged on several grids.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float32

from qdeploy.core.grids import SMALLEST_SCALE, Grid

SHRINK_FACTORS = np.linspace(1.0, 0.2, 81, dtype=np.float32)

Weight = Float32[np.ndarray, "*shape"]
Granularity = Literal["channel", "tensor"]


def absmax_grid(weight: Weight, *, axis: int, max_code: int, per: Granularity = "channel") -> Grid:
    """Symmetric grid whose outermost codes are the channel's largest magnitude.

    `scale = absmax / max_code`, zero point 0, codes in `[-max_code, max_code]`: 7 for 4 bits,
    127 for 8. A channel of zeros gets scale 1, since any scale holds it exactly.

    Args:
        per: With "tensor" all channels have the same scale.
    """
    absmax = np.maximum(*_extremes(weight, axis, per, signs=(-1, 1)))
    return _symmetric(absmax / np.float32(max_code), axis, -max_code, max_code)


def half_grid(weight: Weight, *, axis: int, max_code: int, per: Granularity = "channel") -> Grid:
    """Symmetric grid in which the largest magnitude lies half a step beyond the highest code.

    `scale = absmax / (max_code + 0.5)`, codes in `[-max_code - 1, max_code]`: 127.5 for 8 bits.
    """
    absmax = np.maximum(*_extremes(weight, axis, per, signs=(-1, 1)))
    return _symmetric(absmax / np.float32(max_code + 0.5), axis, -max_code - 1, max_code)


def minmax_grid(weight: Weight, *, axis: int, max_code: int, per: Granularity = "channel") -> Grid:
    """Asymmetric grid from the smallest value to the largest; 0 has a code of its own."""
    low, high = _extremes(weight, axis, per, signs=(1, 1))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    least, most = -max_code - 1, max_code
    scale = _never_zero((high - low) / np.float32(most - least))
    zero_point = np.clip(np.rint(least - low / scale), least, most).astype(np.int32)
    return Grid(scale, zero_point, least, most, axis)


def mse_grid(weight: Weight, *, axis: int, max_code: int, per: Granularity = "channel") -> Grid:
    """Absmax, shrunk by the factor (of 81 from 1 to 0.2) with the least squared rounding error.

    What then lies outside of the grid is cut to its end.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    full = absmax_grid(weight, axis=axis, max_code=max_code, per=per).scale
    errors = []
    for factor in SHRINK_FACTORS:
        scale = (full * factor)[:, None]
        nearest = np.clip(np.rint(rows / scale), -max_code, max_code) * scale
        error = np.square(rows - nearest, dtype=np.float64).sum(axis=1)
        errors.append(np.full_like(error, error.sum()) if per == "tensor" else error)
    scale = full * SHRINK_FACTORS[np.argmin(errors, axis=0)]
    return _symmetric(scale, axis, -max_code, max_code)


GRIDS = {"absmax": absmax_grid, "half": half_grid, "minmax": minmax_grid, "mse": mse_grid}


def _extremes(
    weight: Weight, axis: int, per: Granularity, signs: tuple[int, int]
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    """Smallest and largest value of each channel, each times its sign."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    low, high = weight.min(axis=others), weight.max(axis=others)
    if per == "tensor":
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    return low * signs[0], high * signs[1]


def _symmetric(scale: Float32[np.ndarray, " channels"], axis: int, low: int, high: int) -> Grid:
    return Grid(_never_zero(scale), np.zeros(scale.shape, np.int32), low, high, axis)


def _never_zero(scale: Float32[np.ndarray, " channels"]) -> Float32[np.ndarray, " channels"]:
    return np.where(scale > 0, np.maximum(scale, SMALLEST_SCALE), 1).astype(np.float32)
