"""The choice every rounding method makes: for each weight, a code of its grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32


@dataclass(frozen=True, slots=True, eq=False)
class RoundingProblem:
    """One layer's weights on their grid, as matrices: `groups` independent ones of `rows x fan_in`.

    A row is an output channel and has one scale and one zero point.
    """

    weight: Float32[np.ndarray, "groups rows fan_in"]
    scale: Float32[np.ndarray, "groups rows"]
    zero_point: Int32[np.ndarray, "groups rows"]
    low: int  # codes run from low to high
    high: int

    @classmethod
    def symmetric(
        cls,
        weight: Float32[np.ndarray, "groups rows fan_in"],
        scale: Float32[np.ndarray, "groups rows"],
        max_code: int,
    ) -> RoundingProblem:
        """Codes from `-max_code` to `max_code`, 0 meaning 0."""
        return cls(weight, scale, np.zeros(scale.shape, np.int32), -max_code, max_code)

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
    def least(self) -> Int32[np.ndarray, "groups rows 1"]:
        """The lowest code of each row, in steps."""
        return self.low - self.zero_point[:, :, None]

    @property
    def most(self) -> Int32[np.ndarray, "groups rows 1"]:
        """The highest code of each row, in steps."""
        return self.high - self.zero_point[:, :, None]

    @property
    def free(self) -> Bool[np.ndarray, "groups rows fan_in"]:
        """Where there is a choice: not already on a code, and neither neighbour off the grid."""
        floor = self.floor
        inside = (floor >= self.least) & (floor + 1 <= self.most)
        return inside & (self.steps != floor)

    def codes(
        self, up: Bool[np.ndarray, "groups rows fan_in"]
    ) -> Int32[np.ndarray, "groups rows fan_in"]:
        """The codes chosen by `up`, clipped to the grid."""
        return self.at(self.floor + up)

    def at(
        self, steps: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Int32[np.ndarray, "groups rows fan_in"]:
        """The codes of whole numbers of steps, clipped to the grid."""
        chosen = np.clip(steps, self.least, self.most) + self.zero_point[:, :, None]
        return chosen.astype(np.int32)

    def dequantized(
        self, codes: Int32[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows fan_in"]:
        """The weights that `codes` stand for, as the runtime's float32 arithmetic has them."""
        steps = (codes - self.zero_point[:, :, None]).astype(np.float32)
        return (steps * self.scale[:, :, None]).astype(np.float64)
