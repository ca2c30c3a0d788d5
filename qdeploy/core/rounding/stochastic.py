"""Stochastic rounding: up with a probability equal to the fraction that nearest would drop."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from qdeploy.core.rounding.problem import RoundingProblem


def stochastic(
    problem: RoundingProblem, generator: np.random.Generator
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes whose expectation over `generator` is the weight itself, `P(up) = W/s - floor(W/s)`.

    A weight that is already on a code stays there.
    """
    fraction = problem.steps - problem.floor
    return problem.codes(generator.random(fraction.shape) < fraction)
