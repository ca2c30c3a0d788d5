"""Fix every scale and zero point: of the weights from themselves, of activations from images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qdeploy.core.grids import Grid, asymmetric_grid
from qdeploy.core.observers import Extent, Histogram, mse_range, percentile_range
from qdeploy.core.weight_grids import GRIDS
from qdeploy.data import Images
from qdeploy.errors import InputError
from qdeploy.graph.io import initializers
from qdeploy.progress import SILENT, Progress
from qdeploy.quantization.inner_tensors import Tap, open_tap
from qdeploy.settings.recipe import ActivationSpec
from qdeploy.values import FloatModel, Grids, LayerPlan, QuantPlan

LARGEST_BIAS_CODE = 2**30  # leaves room for bias correction in int32

Range = tuple[float, float]


def calibrate(
    model: FloatModel,
    plan: QuantPlan,
    images: Images | None,
    spec: ActivationSpec,
    progress: Progress = SILENT,
) -> Grids:
    """The grids of all planned weights and activations.

    Images are streamed once (min-max) or twice (percentile, MSE); memory does not depend on how
    many there are. Weights-only plans need none.

    Raises:
        InputError: an activation is not finite on the images.
    """
    activations: dict[str, Grid] = {}
    if plan.activations and images is not None:
        ranges = _ranges(model, plan, images, spec, progress)
        grids = {tensor: asymmetric_grid(*ranges[tensor]) for tensor in plan.ranged}
        activations = {tensor: grids[source] for tensor, source in plan.activations.items()}
    constants = initializers(model.onnx)
    weights = {
        layer.site.name: _weight_grid(layer, constants, activations) for layer in plan.layers
    }
    return Grids(weights, activations)


def _ranges(
    model: FloatModel, plan: QuantPlan, images: Images, spec: ActivationSpec, progress: Progress
) -> dict[str, Range]:
    tap = open_tap(model.onnx, model.input_name, plan.ranged)
    extents = {name: Extent() for name in plan.ranged}
    _observe(tap.stream(images, progress, "ranges"), extents)
    for name, extent in extents.items():
        if not (np.isfinite(extent.low) and np.isfinite(extent.high)):
            raise InputError(
                f"model {model.origin.path}: tensor {name!r} is not finite on calibration images,"
                f" the first of them {_first_not_finite(tap, images, name)}",
                hint="leave such images out, or mend the model",
            )
    if spec.observer == "minmax":
        return {name: (extent.low, extent.high) for name, extent in extents.items()}
    histograms = {name: Histogram(extent.low, extent.high) for name, extent in extents.items()}
    _observe(tap.stream(images, progress, "histograms"), histograms)
    if spec.observer == "mse":
        return {name: mse_range(histogram) for name, histogram in histograms.items()}
    return {name: percentile_range(h, spec.percentile) for name, h in histograms.items()}


def _first_not_finite(tap: Tap, images: Images, tensor: str) -> str:
    """The image that makes it so, as its source calls it."""
    at = 0
    for values in tap.stream(images, SILENT, "where"):
        finite = np.isfinite(values[tensor].reshape(len(values[tensor]), -1)).all(axis=1)
        if not finite.all():
            at += int(finite.argmin())
            break
        at += len(finite)
    return repr(images.source.keys[int(images.indices[min(at, len(images) - 1)])])


def _observe(
    stream: Iterable[Mapping[str, np.ndarray]], observers: Mapping[str, Extent | Histogram]
) -> None:
    for values in stream:
        for name, value in values.items():
            observers[name].update(value)


def _weight_grid(
    layer: LayerPlan, constants: Mapping[str, np.ndarray], activations: Mapping[str, Grid]
) -> Grid:
    """As planned, but widened where the channel's bias would not fit into int32.

    That happens to channels whose weights have all but vanished: their contribution is then far
    below the resolution of anything that follows.
    """
    site = layer.site
    make, per = GRIDS[layer.grid.range], layer.grid.per
    grid = make(constants[site.weight], axis=site.axis, max_code=layer.max_code, per=per)
    smallest = np.zeros_like(grid.scale)
    for use in site.uses:
        if use.bias is not None and use.input in activations:
            step = activations[use.input].scale[0] * np.float32(LARGEST_BIAS_CODE)
            smallest = np.maximum(smallest, np.abs(constants[use.bias]) / step)
    scale = np.maximum(grid.scale, smallest).astype(np.float32)
    return Grid(scale, grid.zero_point, grid.low, grid.high, grid.axis)
