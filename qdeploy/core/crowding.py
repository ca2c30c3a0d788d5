"""What an attack that waits for rounding leaves in the float weights: they crowd at cell edges.

A quantization-conditioned backdoor holds every weight inside its rounding cell while training pulls
it away from the cell's code: many weights end up leaning against the edge. Weights that nobody has
so confined do not know where cells are, and lie across any grid's edges as densely as beside them.
So the count within the outermost fiftieth of the cells is compared with the count just inside.
Not published, as far as we know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from qdeploy.core.grids import Grid

EDGE = (0.48, 0.5)  # distance from the code, in steps
INSIDE = (0.36, 0.46)
SHARE = (EDGE[1] - EDGE[0]) / (INSIDE[1] - INSIDE[0])
PINNED = 0.999  # of the outermost code: weights that set the scale do not move


@dataclass(frozen=True, slots=True)
class Crowding:
    """How many weights lie at cell edges, against how many there should be."""

    at_edge: int
    expected: float  # from the density just inside

    @property
    def ratio(self) -> float:
        """1 for weights that know of no cells; nan if there are too few to say."""
        return self.at_edge / self.expected if self.expected > 0 else math.nan

    @property
    def score(self) -> float:
        """The excess in standard deviations of the two counts."""
        return (self.at_edge - self.expected) / math.sqrt(self.expected * (1 + SHARE) + 1)

    def __add__(self, other: Crowding) -> Crowding:
        return Crowding(self.at_edge + other.at_edge, self.expected + other.expected)


def crowding(weight: Float32[np.ndarray, "*shape"], grid: Grid) -> Crowding:
    """The crowding of `weight` at the cell edges of `grid`.

    Left out are weights outside of the grid, and the outermost of each channel: they sit where the
    convention for the scale puts them.
    """
    scale = grid.scale.reshape(grid.along(weight.ndim))
    steps = weight / scale
    zero = grid.zero_point.reshape(grid.along(weight.ndim))
    bound = np.abs(steps).max(axis=tuple(i for i in range(weight.ndim) if i != grid.axis))
    pinned = np.abs(steps) >= PINNED * bound.reshape(grid.along(weight.ndim))
    within = (steps > grid.low - zero) & (steps < grid.high - zero) & ~pinned
    distance = np.abs(steps - np.rint(steps))[within]
    at_edge, inside = (
        int(np.count_nonzero((distance >= low) & (distance < high + (high == 0.5))))
        for low, high in (EDGE, INSIDE)
    )
    return Crowding(at_edge, inside * SHARE)
