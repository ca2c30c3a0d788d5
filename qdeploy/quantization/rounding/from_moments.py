"""Methods that need only the second moments of a layer's inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from qdeploy.core.moments import Moments, Quadratic
from qdeploy.core.rounding.descent import DescentSettings, descent
from qdeploy.core.rounding.gptq import GptqSettings, gptq
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.quantization.rounding.task import Errors, RoundingTask, degraded, outcome
from qdeploy.settings.methods import AdaroundDescent, BrecqDescent, EfrapDescent, Gptq
from qdeploy.values import LayerPlan, RoundedLayer

MomentsMethod = EfrapDescent | AdaroundDescent | BrecqDescent | Gptq


def solve(
    task: RoundingTask,
    spec: MomentsMethod,
    layer: LayerPlan,
    problem: RoundingProblem,
    moments: Sequence[Moments],
) -> RoundedLayer:
    """Solve one layer; `moments` has one entry per use of its weight."""
    started = time.perf_counter()
    correct = spec.bias_correction and all(use.takes_bias for use in layer.site.uses)
    quadratic = reduce(add, (moment.quadratic(centred=correct) for moment in moments))
    try:
        codes = _choose(spec, problem, quadratic, np.random.default_rng(task.layer_seed(layer)))
    except DivergedError as error:
        return degraded(layer, problem, str(error), started)
    errors = Errors.of(problem, quadratic, codes)
    rounded = problem.dequantized(codes)
    corrections = tuple(m.bias_correction(rounded).reshape(-1) for m in moments) if correct else ()
    return outcome(layer, problem, codes, errors=errors, corrections=corrections, started=started)


def _choose(
    spec: MomentsMethod,
    problem: RoundingProblem,
    quadratic: Quadratic,
    generator: np.random.Generator,
) -> np.ndarray:
    match spec:
        case Gptq():
            return gptq(problem, quadratic, GptqSettings(spec.damping))
        case EfrapDescent():
            settings = DescentSettings(spec.flip_weight, spec.start, spec.sweeps, spec.damping)
        case AdaroundDescent() | BrecqDescent():
            settings = DescentSettings(0.0, "nearest", spec.sweeps, spec.damping)
    return descent(problem, quadratic, settings, generator)
