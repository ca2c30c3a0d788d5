"""Round every weight to the neighbour that nearest does not take: EFRAP's first half alone.

The ablation of Li et al., CVPR 2024, section 5.3. It undoes what an attacker has hidden in the
rounding errors, and doubles the errors of everything else.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from qdeploy.core.rounding.problem import RoundingProblem


def flip(problem: RoundingProblem) -> Int32[np.ndarray, "groups rows fan_in"]:
    """The codes opposite to nearest; a weight on a code, or at the grid's end, keeps it."""
    return problem.codes(problem.nearest_up ^ problem.free)
