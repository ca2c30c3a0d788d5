"""Methods that need only the second moments of a layer's inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from qdeploy.core.moments import Moments
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.quantization.rounding.task import Errors, RoundingTask, degraded, outcome
from qdeploy.settings.methods import FromMoments
from qdeploy.values import LayerPlan, RoundedLayer


def solve(
    task: RoundingTask,
    spec: FromMoments,
    layer: LayerPlan,
    problem: RoundingProblem,
    moments: Sequence[Moments],
) -> RoundedLayer:
    """Solve one layer; `moments` has one entry per use of its weight."""
    started = time.perf_counter()
    correct = spec.bias_correction and all(use.takes_bias for use in layer.site.uses)
    quadratic = reduce(add, (moment.quadratic(centred=correct) for moment in moments))
    try:
        codes = spec.codes(problem, quadratic, np.random.default_rng(task.layer_seed(layer)))
    except DivergedError as error:
        return degraded(layer, problem, str(error), started)
    errors = Errors.of(problem, quadratic, codes)
    rounded = problem.dequantized(codes)
    corrections = tuple(m.bias_correction(rounded).reshape(-1) for m in moments) if correct else ()
    return outcome(layer, problem, codes, errors=errors, corrections=corrections, started=started)
