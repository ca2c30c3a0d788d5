"""What every way of rounding a whole model has in common."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from qdeploy.core.grids import Grid
from qdeploy.core.moments import Quadratic
from qdeploy.core.patches import choose_positions, convolution_rows, linear_rows
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.data import Images
from qdeploy.graph.io import initializers
from qdeploy.values import FloatModel, Grids, LayerPlan, QuantPlan, RoundedLayer, WeightUse


@runtime_checkable
class LayerStore(Protocol):
    """Keeps solved layers, so that an interrupted run can go on where it stopped."""

    def load(self, layer: str) -> Mapping[str, np.ndarray] | None: ...
    def save(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None: ...


class _Forgetful:
    def load(self, layer: str) -> None:
        """Nothing is kept."""

    def save(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep nothing."""


FORGETFUL: LayerStore = _Forgetful()


@dataclass(frozen=True, slots=True)
class RoundingTask:
    """Everything the choice depends on, besides the method."""

    model: FloatModel
    plan: QuantPlan
    grids: Grids
    images: Images | None  # None only for methods that need none
    seed: int

    def problems(self) -> dict[str, RoundingProblem]:
        """The rounding problem of every layer, by name."""
        constants = initializers(self.model.onnx)
        return {
            layer.site.name: layer.problem(constants[layer.site.weight], self.grid(layer))
            for layer in self.plan.layers
        }

    def grid(self, layer: LayerPlan) -> Grid:
        return self.grids.weights[layer.site.name]

    def layer_seed(self, layer: LayerPlan) -> list[int]:
        """Seed of one layer, the same whatever the other layers draw."""
        return [self.seed, self.plan.layers.index(layer)]

    def calibration(self) -> Images:
        if self.images is None:
            raise ValueError("this rounding method needs calibration images")
        return self.images


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean squared output error over the output's variance, of the choice and of nearest."""

    chosen: float = math.nan
    nearest: float = math.nan

    @classmethod
    def of(cls, problem: RoundingProblem, quadratic: Quadratic, codes: np.ndarray) -> Errors:
        """As the moments have them."""
        energy = max(float(quadratic.energy.sum()), np.finfo(np.float64).tiny)
        errors = (quadratic.error(problem.dequantized(c)).sum() for c in (codes, nearest(problem)))
        return cls(*(float(error) / energy for error in errors))


def outcome(
    layer: LayerPlan,
    problem: RoundingProblem,
    codes: np.ndarray,
    *,
    started: float,
    errors: Errors = Errors(),
    corrections: tuple[np.ndarray, ...] = (),
) -> RoundedLayer:
    """The record of a layer that got the method it was planned for."""
    return RoundedLayer(
        name=layer.site.name,
        codes=layer.site.from_matrix(codes),
        rounding_used=layer.rounding,
        degraded=None,
        flipped=float((codes != nearest(problem)).mean()),
        output_error=errors.chosen,
        nearest_error=errors.nearest,
        bias_corrections=corrections,
        seconds=time.perf_counter() - started,
    )


def degraded(
    layer: LayerPlan, problem: RoundingProblem, reason: str, started: float
) -> RoundedLayer:
    """The record of a layer that had to be rounded to nearest. The gate reads `degraded`."""
    return RoundedLayer(
        name=layer.site.name,
        codes=layer.site.from_matrix(nearest(problem)),
        rounding_used="nearest",
        degraded=f"{layer.rounding}: {reason}",
        flipped=0.0,
        output_error=math.nan,
        nearest_error=math.nan,
        bias_corrections=(),
        seconds=time.perf_counter() - started,
    )


def positions(
    use: WeightUse, x: np.ndarray, limit: int, generator: np.random.Generator
) -> np.ndarray:
    """Output positions (or tokens) of a layer's input `x` to look at."""
    shape = use.window.output_shape(x.shape[2:]) if use.window else x.shape[1:-1]
    return choose_positions(shape, limit, generator)


def rows(use: WeightUse, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What the weight is multiplied with at the positions `at`: groups, samples, fan_in."""
    return convolution_rows(x, use.window, at) if use.window else linear_rows(x, at)


def stored(store: LayerStore, layer: LayerPlan) -> RoundedLayer | None:
    """The layer as `store` has it; None if it was not solved yet."""
    arrays = store.load(layer.site.name)
    if arrays is None:
        return None
    numbers = {
        key: float(arrays[key]) for key in ("flipped", "output_error", "nearest_error", "seconds")
    }
    reason = str(arrays["degraded"])
    corrections = sorted(key for key in arrays if key.startswith("correction"))
    return RoundedLayer(
        name=layer.site.name,
        codes=arrays["codes"],
        rounding_used=str(arrays["rounding_used"]),
        degraded=reason or None,
        bias_corrections=tuple(arrays[key] for key in corrections),
        **numbers,
    )


def keep(store: LayerStore, layer: RoundedLayer) -> None:
    """Give a solved layer to `store`."""
    corrections = {f"correction{i:03}": c for i, c in enumerate(layer.bias_corrections)}
    store.save(
        layer.name,
        {
            "codes": layer.codes,
            "rounding_used": np.array(layer.rounding_used),
            "degraded": np.array(layer.degraded or ""),
            "flipped": np.array(layer.flipped),
            "output_error": np.array(layer.output_error),
            "nearest_error": np.array(layer.nearest_error),
            "seconds": np.array(layer.seconds),
            **corrections,
        },
    )
