"""Layers fitted to the float model's own activations: independent, so one stream serves all."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.core.moments import FloatInputMoments
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.machine import require_torch
from qdeploy.progress import Progress
from qdeploy.quantization.inner_tensors import open_tap
from qdeploy.quantization.parallel import in_parallel
from qdeploy.quantization.rounding.from_moments import solve
from qdeploy.quantization.rounding.task import (
    LayerStore,
    RoundingTask,
    keep,
    outcome,
    positions,
    rows,
    stored,
)
from qdeploy.settings.methods import FromMoments, FromWeights
from qdeploy.values import LayerPlan, RoundedLayer, WeightUse

if TYPE_CHECKING:
    from qdeploy.quantization.rounding.importance import Fisher

LEAST_POSITIONS, LEAST_SAMPLES = 16, 1 << 14  # of an image, and of all, if they have so many
SAMPLES_AN_INPUT = 14  # of a row: with half as many, errors on other images are 5 % larger
MOMENT_BYTES = 640 << 20  # of second moments held at a time: all that ResNet-50 has


def round_without_images(task: RoundingTask, spec: FromWeights) -> tuple[RoundedLayer, ...]:
    """Rounding that looks at nothing but the weights."""
    problems = task.problems()

    def one(layer: LayerPlan) -> RoundedLayer:
        started, problem = time.perf_counter(), problems[layer.site.name]
        codes = spec.codes(problem, np.random.default_rng(task.layer_seed(layer)))
        return outcome(layer, problem, codes, started=started)

    return tuple(one(layer) for layer in task.plan.layers)


def round_in_one_pass(
    task: RoundingTask, spec: FromMoments, store: LayerStore, progress: Progress
) -> tuple[RoundedLayer, ...]:
    """Every layer from the moments of the float model's inputs."""
    problems = task.problems()
    done = {layer.site.name: stored(store, layer) for layer in task.plan.layers}
    unsolved = [layer for layer in task.plan.layers if done[layer.site.name] is None]
    size = _images_at_once(task) if unsolved else 0
    for chunk in _chunks(unsolved, problems):
        moments = _moments(task, spec, chunk, problems, progress, size=size)
        work = partial(_solve, task, spec, problems, moments)
        for result in progress.track(in_parallel(work, chunk), "solve", len(chunk)):
            keep(store, result)
            done[result.name] = result
    return tuple(result for result in done.values() if result is not None)


def _solve(
    task: RoundingTask,
    spec: FromMoments,
    problems: Mapping[str, RoundingProblem],
    moments: dict[str, list[FloatInputMoments]],
    layer: LayerPlan,
) -> RoundedLayer:
    """Solve one layer, and let its moments go."""
    name = layer.site.name
    return solve(task, spec, layer, problems[name], moments.pop(name))


def _chunks(
    layers: list[LayerPlan], problems: Mapping[str, RoundingProblem]
) -> Iterator[list[LayerPlan]]:
    """Runs of layers whose moments fit into memory together; each costs a pass over the images."""
    chunk: list[LayerPlan] = []
    held = 0
    for layer in layers:
        groups, _, fan_in = problems[layer.site.name].weight.shape
        size = 4 * groups * fan_in**2 * len(layer.site.uses)
        if chunk and held + size > MOMENT_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(layer)
        held += size
    if chunk:
        yield chunk


def _images_at_once(task: RoundingTask) -> int:
    """The same for all chunks, and whatever is left of an interrupted run: so are the moments."""
    names = {use.input for layer in task.plan.layers for use in layer.site.uses}
    tap = open_tap(task.model.onnx, task.model.input_name, sorted(names))
    return tap.at_once(task.calibration().preprocessing.shape)


def _moments(
    task: RoundingTask,
    spec: FromMoments,
    layers: list[LayerPlan],
    problems: Mapping[str, RoundingProblem],
    progress: Progress,
    *,
    size: int,
) -> dict[str, list[FloatInputMoments]]:
    """Second moments of the inputs of each use of each layer's weight.

    Each has positions of its own, drawn by the layer's seed: which other layers there are, and
    which of them an interrupted run has solved, changes nothing.

    Args:
        size: Images of a batch.
    """
    moments = {
        layer.site.name: [
            FloatInputMoments(problems[layer.site.name].weight) for _ in layer.site.uses
        ]
        for layer in layers
    }
    pairs = [
        pair
        for layer in layers
        for pair in zip(layer.site.uses, moments[layer.site.name], strict=True)
    ]
    enough = {
        moment: _positions(spec.positions, problems[layer.site.name], len(task.calibration()))
        for layer in layers
        for moment in moments[layer.site.name]
    }
    input_name = task.model.input_name
    names = [use.input for use, _ in pairs]
    fisher = _fisher(task, spec, [use for use, _ in pairs])
    tap = open_tap(task.model.onnx, input_name, [*names, input_name] if fisher else names)
    generators = {
        moment: np.random.default_rng([*task.layer_seed(layer), number])
        for layer in layers
        for number, moment in enumerate(moments[layer.site.name])
    }
    for values in tap.stream(task.calibration(), progress, "moments", size):
        importance = fisher.importance(values[input_name]) if fisher else {}
        samples = []
        for use, moment in pairs:
            x = values[use.input]
            at = positions(use, x, enough[moment], generators[moment])
            counts = importance[use.output][:, :, at] if importance else None
            samples.append(_Samples(moment, use, x, at, counts))
        for _ in in_parallel(_Samples.count, samples):
            pass
    return moments


def _positions(most: int, problem: RoundingProblem, images: int) -> int:
    """How many of an image are looked at: more say nothing that other images do not say better."""
    wanted = max(SAMPLES_AN_INPUT * problem.weight.shape[-1], LEAST_SAMPLES)
    return min(most, max(LEAST_POSITIONS, math.ceil(wanted / images)))


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """What one batch of images adds to the moments of one use of a weight."""

    moment: FloatInputMoments
    use: WeightUse
    inputs: np.ndarray
    positions: np.ndarray
    importance: np.ndarray | None  # groups, images, positions

    def count(self) -> None:
        """Add them."""
        matrix = rows(self.use, self.inputs, self.positions)
        weight = self.importance
        self.moment.update(matrix, None if weight is None else weight.reshape(len(weight), -1))


def _fisher(task: RoundingTask, spec: FromMoments, uses: list[WeightUse]) -> Fisher | None:
    """What weighs the samples; None where all count the same."""
    if not spec.weighted:
        return None
    require_torch(f"rounding {spec.name}")
    from qdeploy.quantization.rounding.importance import Fisher

    return Fisher.of(task.model, uses, task.seed)
