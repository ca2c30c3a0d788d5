"""Ranges of activations, found in one or two passes over a stream of values.

Memory does not grow with the stream: an `Extent` is two numbers, a `Histogram` a fixed number of
counts. Min-max needs the first pass alone; percentile and MSE read the histogram of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Float64, Int64

BINS = 4096
SHRINK_FACTORS = np.linspace(0.2, 1.0, 81)


@dataclass(slots=True)
class Extent:
    """Smallest and largest value seen; nan as soon as one value was."""

    low: float = np.inf
    high: float = -np.inf

    def update(self, values: Float32[np.ndarray, "*shape"]) -> None:
        self.low = float(np.minimum(self.low, values.min()))  # Python's min would forget a nan
        self.high = float(np.maximum(self.high, values.max()))


@dataclass(slots=True)
class Histogram:
    """How many values fell into each of `BINS` equal bins between `low` and `high`."""

    low: float
    high: float
    counts: Int64[np.ndarray, " bins"] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def update(self, values: Float32[np.ndarray, "*shape"]) -> None:
        if self.high > self.low:
            self.counts += np.histogram(values, bins=BINS, range=(self.low, self.high))[0]

    @property
    def edges(self) -> Float64[np.ndarray, " edges"]:
        return np.linspace(self.low, self.high, BINS + 1)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves out `100 - percentile` percent of the values, half at either end.

    An end that is 0 stays 0: it is the floor of a ReLU, not a tail.
    """
    total = int(histogram.counts.sum())
    if total == 0:
        return histogram.low, histogram.high
    tail = (1 - percentile / 100) / 2 * total
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)])
    edges = histogram.edges
    low = float(edges[np.searchsorted(cumulative, tail, side="right") - 1])
    high = float(edges[np.searchsorted(cumulative, total - tail, side="left")])
    return (0.0 if histogram.low == 0 else low), (0.0 if histogram.high == 0 else high)


def mse_range(histogram: Histogram, levels: int = 255) -> tuple[float, float]:
    """The range, a shrunken copy of the extent, whose grid has the least mean squared error.

    The error of a value inside the range is taken as uniform, `step^2 / 12`; a value outside is
    moved to the nearer end.
    """
    if histogram.counts.sum() == 0:
        return histogram.low, histogram.high
    centers = np.array([(a + b) / 2 for a, b in pairwise(histogram.edges)])

    def error(shrink: float) -> float:
        low, high = histogram.low * shrink, histogram.high * shrink
        step = (max(high, 0) - min(low, 0)) / levels
        clipped = centers - np.clip(centers, low, high)
        return float(histogram.counts @ np.where(clipped == 0, step**2 / 12, clipped**2))

    best = min(SHRINK_FACTORS[::-1], key=error)
    return histogram.low * best, histogram.high * best
