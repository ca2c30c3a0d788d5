"""Layers fitted, one after the other, to what the layers before them feed them once in integers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from qdeploy.core.moments import PairedMoments
from qdeploy.core.program import Program
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.graph.assemble import assemble
from qdeploy.graph.io import initializers, serialize
from qdeploy.graph.parts import as_program
from qdeploy.progress import Progress
from qdeploy.quantization.prefix_runner import BATCH, Walk
from qdeploy.quantization.rounding.from_moments import solve
from qdeploy.quantization.rounding.task import (
    LayerStore,
    RoundingTask,
    degraded,
    keep,
    outcome,
    positions,
    rows,
    stored,
)
from qdeploy.quantization.rounding.unit import Behind, make_unit, train_unit
from qdeploy.settings.methods import FromMoments, Trained
from qdeploy.values import LayerPlan, RoundedLayer, WeightUse


def round_layer_by_layer(
    task: RoundingTask,
    spec: FromMoments | Trained,
    store: LayerStore,
    progress: Progress,
) -> tuple[RoundedLayer, ...]:
    """Every layer on inputs from the quantized prefix, by any method."""
    problems, done = task.problems(), dict[str, RoundedLayer]()
    pair: _Pair | None = None
    for layer in progress.track(task.plan.layers, "solve", len(task.plan.layers)):
        name = layer.site.name
        result = stored(store, layer)
        if result is None:
            pair = pair or _Pair.start(task, needs_logits=spec.predicts)
            pair.advance(task, layer, done)
            result = _solve(task, pair, spec, layer, problems[name], progress)
            keep(store, result)
        done[name] = result
    return tuple(done.values())


def _solve(
    task: RoundingTask,
    pair: _Pair,
    spec: FromMoments | Trained,
    layer: LayerPlan,
    problem: RoundingProblem,
    progress: Progress,
) -> RoundedLayer:
    if isinstance(spec, Trained):
        return _train(task, pair, spec, layer, problem, progress)
    return solve(task, spec, layer, problem, _paired_moments(task, pair, spec, layer, problem))


@dataclass(slots=True)
class _Pair:
    """The float model and the one that is quantized up to a layer, side by side on all images."""

    floats: Walk
    prefix: Walk
    logits: np.ndarray | None  # of the float model
    program: Program | None  # of the float model

    @classmethod
    def start(cls, task: RoundingTask, *, needs_logits: bool) -> _Pair:
        """Before the first layer."""
        model, images = task.model, task.calibration()
        floats = Walk.start(model.input_name, images)
        prefix = Walk({**floats.values}, set(floats.done))
        if not needs_logits:
            return cls(floats, prefix, None, None)
        whole = Walk({**floats.values}, set(floats.done))
        whole.advance(model.onnx, [model.output_name])
        return cls(floats, prefix, whole.values[model.output_name], as_program(model.onnx))

    def advance(self, task: RoundingTask, layer: LayerPlan, done: dict[str, RoundedLayer]) -> None:
        """Walk both models up to what `layer` reads, and the float one through it."""
        uses = layer.site.uses
        passed = [
            u for other in task.plan.layers if other.site.name in done for u in other.site.uses
        ]
        quantized = serialize(assemble(task.model, task.plan, task.grids, done))
        wanted = [*(_after(u) for u in passed), *(u.input for u in uses)]
        self.prefix.advance(quantized, [_in_integers(task, name) for name in wanted])
        self.floats.advance(task.model.onnx, [*(u.input for u in uses), *(_after(u) for u in uses)])

    def inputs(self, task: RoundingTask, use: WeightUse) -> np.ndarray:
        """What the quantized prefix feeds the layer."""
        return self.prefix.values[_in_integers(task, use.input)]

    def behind(self, task: RoundingTask, use: WeightUse) -> Behind:
        """The float network from the layer's output to the logits, fed by the quantized prefix."""
        assert self.program is not None  # noqa: S101 - methods that need it have asked for it
        assert self.logits is not None  # noqa: S101
        given = {
            name.removesuffix(".dequantized"): value
            for name, value in self.prefix.values.items()
            if not name.endswith(".quantized")
        }
        output, logits = _after(use), task.model.output_name
        given.pop(output, None)
        channels_last = use.window is None
        return Behind(self.program, output, logits, given, self.logits, channels_last)


def _after(use: WeightUse) -> str:
    """The output of a layer's unit: behind the ReLU, if one follows."""
    return use.activation or use.output


def _in_integers(task: RoundingTask, name: str) -> str:
    return f"{name}.dequantized" if name in task.grids.activations else name


def _paired_moments(
    task: RoundingTask,
    pair: _Pair,
    spec: FromMoments,
    layer: LayerPlan,
    problem: RoundingProblem,
) -> list[PairedMoments]:
    moments = []
    for use in layer.site.uses:
        moment = PairedMoments(problem.weight)
        generator = np.random.default_rng(task.seed)
        float_inputs, inputs = pair.floats.values[use.input], pair.inputs(task, use)
        for first in range(0, len(inputs), BATCH):
            x, float_x = (np.asarray(v[first : first + BATCH]) for v in (inputs, float_inputs))
            at = positions(use, x, spec.positions, generator)
            wanted = rows(use, float_x, at) @ problem.weight.transpose(0, 2, 1)
            moment.update(rows(use, x, at), wanted)
        moments.append(moment)
    return moments


def _train(
    task: RoundingTask,
    pair: _Pair,
    spec: Trained,
    layer: LayerPlan,
    problem: RoundingProblem,
    progress: Progress,
) -> RoundedLayer:
    started = time.perf_counter()
    if len(layer.site.uses) > 1:
        return degraded(layer, problem, "a weight of several nodes has no unit to train", started)
    (use,) = layer.site.uses
    bias = initializers(task.model.onnx)[use.bias] if use.bias else None
    inputs, wanted = pair.inputs(task, use), pair.floats.values[_after(use)]
    unit = make_unit(layer.site, use, bias, inputs, wanted)
    behind = pair.behind(task, use) if pair.program is not None else None
    try:
        codes = train_unit(problem, unit, spec, task.layer_seed(layer), behind, progress)
    except DivergedError as error:
        return degraded(layer, problem, str(error), started)
    return outcome(layer, problem, codes, started=started)
