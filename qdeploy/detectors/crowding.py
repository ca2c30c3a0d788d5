"""Was this model made for a quantizer? Its weights may tell, and for which one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add

import numpy as np

from qdeploy.core.crowding import PINNED, Crowding, crowding
from qdeploy.core.grids import Grid
from qdeploy.core.weight_grids import GRIDS, Granularity
from qdeploy.detectors.known import Detected, NotLookedAt, Suspect
from qdeploy.graph.io import initializers, parse
from qdeploy.graph.sites import find_sites
from qdeploy.progress import SILENT, Progress
from qdeploy.values import FloatModel

BITS = (4, 5, 6, 7, 8)
RANGES = ("absmax", "half", "minmax")
GRANULARITIES: tuple[Granularity, ...] = ("channel", "tensor")
LARGEST_SAMPLE = 1 << 18  # weights of a layer that are looked at
LIMIT = 8.0  # standard deviations; the clean models at hand stay below 4
NEARLY = 0.8
COUNTED = 10_000  # weights of a layer whose values are compared
MOST_CODES = 256  # of any grid in use


@dataclass(frozen=True, slots=True)
class Convention:
    """A quantizer's way from weights to scales."""

    bits: int
    range: str
    per: Granularity

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.range} per {self.per}"


@dataclass(frozen=True, slots=True)
class CellCrowding:
    """How far the weights know of one convention's cells."""

    convention: Convention
    whole: Crowding
    layer: str  # the most crowded one
    worst: Crowding

    @property
    def score(self) -> float:
        """Of the whole model or of its most crowded layer, whichever says more."""
        return max(self.whole.score, self.worst.score)


@dataclass(frozen=True, slots=True)
class WeightScan:
    """What the weights tell."""

    crowding: tuple[CellCrowding, ...]  # the strongest first
    skipped: tuple[str, ...]  # layers on a grid already, or too small to tell

    @property
    def score(self) -> float:
        """The strongest; 0 if there was nothing to look at."""
        return max((f.score for f in self.crowding), default=0.0)

    @property
    def found(self) -> CellCrowding | None:
        """The convention that the model was made for, if its weights show one.

        Cells of 4 bits end where cells of 7 bits do (63 = 9 x 7): of two that say nearly the same,
        the coarser is meant.
        """
        if self.score <= LIMIT:
            return None
        alike = (f for f in self.crowding if f.score > NEARLY * self.score)
        return min(alike, key=lambda f: f.convention.bits)


NO_SCAN = WeightScan((), ())


def detect(suspect: Suspect, progress: Progress = SILENT) -> Detected | NotLookedAt:
    """How far the float weights know of a quantizer's cells."""
    if suspect.float_model is None:
        return NotLookedAt("no float model is known")
    scan = scan_weights(suspect.float_model, progress)
    if not scan.crowding:
        return NotLookedAt("there are no float weights off a grid to look at")
    return Detected(scan.score, str(scan.crowding[0].convention), scan)


def scan_weights(model: FloatModel, progress: Progress = SILENT) -> WeightScan:
    """Compare every convolution's and matrix product's weights with the cells of usual grids."""
    constants = initializers(model.onnx)
    sites, _ = find_sites(parse(model.onnx))
    weights, skipped = {}, []
    for site in sites:
        rows = site.to_matrix(constants[site.weight]).reshape(site.shape[site.axis], -1)
        if _on_a_grid(rows):
            skipped.append(site.name)
        else:
            weights[site.name] = rows
    conventions = [Convention(*values) for values in product(BITS, RANGES, GRANULARITIES)]
    if not weights:
        return WeightScan((), tuple(skipped))
    tracked = progress.track(conventions, "scan", len(conventions))
    found = sorted((_of_convention(c, weights) for c in tracked), key=lambda f: -f.score)
    return WeightScan(tuple(found), tuple(skipped))


def _of_convention(convention: Convention, weights: dict[str, np.ndarray]) -> CellCrowding:
    layers = dict(_crowdings(convention, weights))
    name = max(layers, key=lambda key: layers[key].score)
    return CellCrowding(convention, reduce(add, layers.values()), name, layers[name])


def _crowdings(
    convention: Convention, weights: dict[str, np.ndarray]
) -> Iterator[tuple[str, Crowding]]:
    make = GRIDS[convention.range]
    max_code = 2 ** (convention.bits - 1) - 1
    for name, rows in weights.items():
        grid = make(rows, axis=0, max_code=max_code, per=convention.per)
        some = max(1, LARGEST_SAMPLE // rows.shape[1])
        stride = -(-len(rows) // some)
        kept = slice(None, None, stride)
        part = Grid(grid.scale[kept], grid.zero_point[kept], grid.low, grid.high, 0)
        yield name, crowding(np.ascontiguousarray(rows[kept]), part)


def _on_a_grid(rows: np.ndarray) -> bool:
    """Whether there are no more values than codes, channels brought to one scale; or too few."""
    bound = np.abs(rows).max(axis=1, keepdims=True)
    values = np.divide(rows, bound, out=np.zeros_like(rows), where=bound > 0)
    values = values[(values != 0) & (np.abs(values) < PINNED)]
    some = np.round(values[:: 1 + values.size // COUNTED], 6)
    return np.unique(some).size <= MOST_CODES
