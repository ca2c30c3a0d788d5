"""Round to nearest, half to even: what every runtime does, and what the attacker counts on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from qdeploy.core.rounding.problem import RoundingProblem


def nearest(problem: RoundingProblem) -> Int32[np.ndarray, "groups rows fan_in"]:
    """The codes that ONNX QuantizeLinear would choose for the problem's weights."""
    return problem.codes(problem.nearest_up)
