"""The choice every rounding method makes: for each weight, the code below it or the code above."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32


@dataclass(frozen=True, slots=True, eq=False)
class RoundingProblem:
    """One layer's weights on their grid, as matrices: `groups` independent ones of `rows x fan_in`.

    A row is an output channel and has one scale.
    """

    weight: Float32[np.ndarray, "groups rows fan_in"]
    scale: Float32[np.ndarray, "groups rows"]
    max_code: int  # codes run from -max_code to max_code

    @property
    def steps(self) -> Float32[np.ndarray, "groups rows fan_in"]:
        """The weights in units of their scale."""
        return self.weight / self.scale[:, :, None]

    @property
    def floor(self) -> Float64[np.ndarray, "groups rows fan_in"]:
        return np.floor(self.steps).astype(np.float64)

    @property
    def nearest_up(self) -> Bool[np.ndarray, "groups rows fan_in"]:
        """Where rounding half to even, which the runtime's QuantizeLinear does, goes up."""
        return np.rint(self.steps) > np.floor(self.steps)

    @property
    def error(self) -> Float64[np.ndarray, "groups rows fan_in"]:
        """Distance to the nearest code, in steps: in `[0, 0.5]` inside the grid."""
        steps = self.steps
        return np.abs(np.rint(steps) - steps).astype(np.float64)

    @property
    def free(self) -> Bool[np.ndarray, "groups rows fan_in"]:
        """Where there is a choice: not already on a code, and neither neighbour off the grid."""
        floor = self.floor
        inside = (floor >= -self.max_code) & (floor + 1 <= self.max_code)
        return inside & (self.steps != floor)

    def codes(
        self, up: Bool[np.ndarray, "groups rows fan_in"]
    ) -> Int32[np.ndarray, "groups rows fan_in"]:
        """The codes chosen by `up`, clipped to the grid."""
        return np.clip(self.floor + up, -self.max_code, self.max_code).astype(np.int32)

    def dequantized(
        self, codes: Int32[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows fan_in"]:
        """The weights that `codes` stand for, as the runtime's float32 arithmetic has them."""
        return (codes.astype(np.float32) * self.scale[:, :, None]).astype(np.float64)
