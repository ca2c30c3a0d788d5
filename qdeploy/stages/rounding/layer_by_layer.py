"""Layers fitted, one after the other, to what the layers before them feed them once in integers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qdeploy.core.moments import PairedMoments
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.graph.assemble import assemble
from qdeploy.graph.io import initializers, serialize
from qdeploy.model import LayerPlan, RoundedLayer, WeightUse
from qdeploy.progress import Progress
from qdeploy.recipe import EfrapAdam, EfrapDescent
from qdeploy.stages.rounding.task import (
    LayerStore,
    RoundingTask,
    degraded,
    descend,
    keep,
    outcome,
    positions,
    rows,
    stored,
)
from qdeploy.tap import Tap, open_tap

BATCH = 64


def round_layer_by_layer(
    task: RoundingTask,
    spec: EfrapDescent | EfrapAdam,
    store: LayerStore,
    progress: Progress,
) -> tuple[RoundedLayer, ...]:
    """EFRAP with inputs from the quantized prefix, by either solver.

    The network up to a layer is run again for every layer: L layers cost O(L^2).
    """
    problems, done = task.problems(), dict[str, RoundedLayer]()
    for layer in progress.track(task.plan.layers, "solve", len(task.plan.layers)):
        name = layer.site.name
        result = stored(store, layer)
        if result is None:
            pair = _PrefixPair.before(task, layer, done)
            if isinstance(spec, EfrapAdam):
                result = _train(pair, spec, problems[name], progress)
            else:
                moments = _paired_moments(pair, spec, problems[name])
                result = descend(task, spec, layer, problems[name], moments)
            keep(store, result)
        done[name] = result
    return tuple(done.values())


@dataclass(frozen=True, slots=True)
class _PrefixPair:
    """The float model and the one that is quantized up to a layer, side by side."""

    task: RoundingTask
    layer: LayerPlan
    float_tap: Tap
    prefix_tap: Tap

    @classmethod
    def before(
        cls, task: RoundingTask, layer: LayerPlan, done: Mapping[str, RoundedLayer]
    ) -> _PrefixPair:
        uses = layer.site.uses
        wanted = [name for use in uses for name in (use.input, use.activation or use.output)]
        prefix = serialize(assemble(task.model, task.plan, task.grids, done))
        name = task.model.input_name
        return cls(
            task,
            layer,
            open_tap(task.model.onnx, name, wanted),
            open_tap(prefix, name, (cls._quantized(task, use) for use in uses)),
        )

    def stream(self) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Float values by name, and the quantized inputs under the float names."""
        images = self.task.calibration()
        for batch in images.batches(BATCH):
            x = images.preprocessing.normalise(batch.pixels)
            prefix = self.prefix_tap(x)
            names = {use.input: self._quantized(self.task, use) for use in self.layer.site.uses}
            yield self.float_tap(x), {name: prefix[q] for name, q in names.items()}

    @staticmethod
    def _quantized(task: RoundingTask, use: WeightUse) -> str:
        return f"{use.input}.dequantized" if use.input in task.grids.activations else use.input


def _paired_moments(
    pair: _PrefixPair, spec: EfrapDescent, problem: RoundingProblem
) -> list[PairedMoments]:
    uses = pair.layer.site.uses
    moments = [PairedMoments(*problem.weight.shape) for _ in uses]
    generator = np.random.default_rng(pair.task.seed)
    for float_values, prefix_values in pair.stream():
        for use, moment in zip(uses, moments, strict=True):
            x = prefix_values[use.input]
            at = positions(use, x, spec.positions, generator)
            wanted = rows(use, float_values[use.input], at) @ problem.weight.transpose(0, 2, 1)
            moment.update(rows(use, x, at), wanted)
    return moments


def _train(
    pair: _PrefixPair, spec: EfrapAdam, problem: RoundingProblem, progress: Progress
) -> RoundedLayer:
    """The published solver. It holds the layer's inputs for all images in memory."""
    from qdeploy.stages.rounding.unit import make_unit, train

    layer, started = pair.layer, time.perf_counter()
    if len(layer.site.uses) > 1:
        return degraded(layer, problem, "a weight of several nodes has no unit to train", started)
    (use,) = layer.site.uses
    collected = [
        (prefix[use.input], values[use.activation or use.output])
        for values, prefix in pair.stream()
    ]
    inputs, wanted = (np.concatenate(part) for part in zip(*collected, strict=True))
    bias = initializers(pair.task.model.onnx)[use.bias] if use.bias else None
    unit = make_unit(layer.site, use, bias, inputs, wanted)
    try:
        codes = train(problem, unit, spec, pair.task.layer_seed(layer), progress)
    except DivergedError as error:
        return degraded(layer, problem, str(error), started)
    return outcome(layer, problem, codes, started=started)
