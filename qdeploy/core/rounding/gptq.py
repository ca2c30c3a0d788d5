"""GPTQ: column after column to nearest, each column's error spread over those still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023. In the basis of the Gram matrix's Cholesky factor it is Babai's nearest-plane algorithm
(Chen et al., "The Geometry of LLM Quantization", 2025). Each column goes to the *nearest* code of a
target that has moved, and may so end up more than one step away from its own weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32

from qdeploy.core.moments import Quadratic
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError

BLOCK = 128


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """Columns are taken by falling mean square of their input, the order the authors recommend."""

    damping: float  # share of the mean diagonal added to the Gram matrix; the authors use 0.01


def gptq(
    problem: RoundingProblem, quadratic: Quadratic, settings: GptqSettings
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes after one pass over the columns. Deterministic; float64.

    Raises:
        DivergedError: the inputs were not finite, or the damped Gram matrix is singular.
    """
    groups = range(len(problem.weight))
    steps = np.stack([_solve_group(problem, quadratic, settings, g) for g in groups])
    return problem.at(steps)


def _solve_group(
    problem: RoundingProblem, quadratic: Quadratic, settings: GptqSettings, group: int
) -> Float64[np.ndarray, "rows fan_in"]:
    """The codes of one group in steps. Inputs that are always 0 say nothing: nearest then."""
    gram = quadratic.gram[group].astype(np.float64)
    if not gram.any():
        return np.rint(problem.steps[group]).astype(np.float64)
    order = np.argsort(-np.diagonal(gram), kind="stable")
    factor = _inverse_factor(gram[np.ix_(order, order)], settings.damping)
    target = _best_float(quadratic, group, settings.damping)[:, order]
    scale = problem.scale[group].astype(np.float64)
    least, most = problem.least[group][:, 0], problem.most[group][:, 0]
    steps = np.empty_like(target)
    columns = target.shape[1]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = np.empty((len(target), last - first))
        for j in range(first, last):
            steps[:, j] = np.clip(np.rint(target[:, j] / scale), least, most)
            errors[:, j - first] = (target[:, j] - steps[:, j] * scale) / factor[j, j]
            target[:, j + 1 : last] -= errors[:, j - first, None] * factor[j, j + 1 : last]
        target[:, last:] -= errors @ factor[first:last, last:]
    in_place = np.empty_like(steps)
    in_place[:, order] = steps
    if not np.isfinite(in_place).all():
        raise DivergedError("the damped Gram matrix is singular: its errors are not finite")
    return in_place


def _inverse_factor(
    gram: Float64[np.ndarray, "fan_in fan_in"], damping: float
) -> Float64[np.ndarray, "fan_in fan_in"]:
    """Upper triangular `U` with `U^T U = inverse(gram + damping)`."""
    if not np.isfinite(gram).all():
        raise DivergedError("the layer's inputs are not finite on the calibration images")
    mean = max(float(np.diagonal(gram).mean()), np.finfo(np.float64).tiny)
    damped = gram + damping * mean * np.eye(len(gram))
    try:
        factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError as error:
        raise DivergedError(f"the damped Gram matrix is singular: {error}") from error
    return factor


def _best_float(
    quadratic: Quadratic, group: int, damping: float
) -> Float64[np.ndarray, "rows fan_in"]:
    """The float weights whose output is closest to the wanted one: where the errors start from.

    With the float model's inputs those are the weights themselves.
    """
    weight, gram = quadratic.weight[group], quadratic.gram[group].astype(np.float64)
    if quadratic.missing is None:
        return weight.copy()
    missing = quadratic.missing[group]
    mean = max(float(np.diagonal(gram).mean()), np.finfo(np.float64).tiny)
    return weight + np.linalg.solve(gram + damping * mean * np.eye(len(gram)), missing.T).T
