"""EFRAP as a binary quadratic problem, solved exactly coordinate by coordinate.

Source of the objective: Li et al., "Nearest is Not Dearest: Towards Practical Defense against
Quantization-conditioned Backdoor Attacks", CVPR 2024, sections 4.2 and 4.3. There a sigmoid
relaxation is trained for 10,000 Adam steps; at binary choices `h` (1 = up) the same objective is

    min over h   error(W_hat)  +  sum_i price_i * [h_i == nearest_i]

where `error` is quadratic (`qdeploy.core.moments`) and the price for agreeing with nearest rounding
grows with the rounding error, the carrier of the attack. Rows are independent and share a Gram
matrix, so one choice per row is flipped at a time for all rows at once; column blocks keep the
gradient up to date with one matrix product per block, as GPTQ does (Frantar et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32

from qdeploy.core.moments import Quadratic
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError

BLOCK = 64


@dataclass(frozen=True, slots=True)
class DescentSettings:
    """At `flip_weight` (mu) 1, agreeing with nearest everywhere costs as much as its error."""

    flip_weight: float
    start: Literal["nearest", "flipped", "stochastic"]
    sweeps: int  # at most; stops when no flip improves the objective
    damping: float  # share of the mean diagonal added to the Gram matrix; pulls towards W


def descent(
    problem: RoundingProblem,
    quadratic: Quadratic,
    settings: DescentSettings,
    generator: np.random.Generator,
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes at which no single flip lowers the objective (or `sweeps` sweeps were made).

    Deterministic but for the seeded start. All arithmetic is float64: gradients are updated in
    place over thousands of flips, and a flip is taken for any gain above zero.

    Raises:
        DivergedError: the inputs were not finite, so that there is nothing to descend.
    """
    if not (np.isfinite(quadratic.gram).all() and np.isfinite(quadratic.cross).all()):
        raise DivergedError("the layer's inputs are not finite on the calibration images")
    up = _start(problem, settings.start, generator)
    damped = _damp(quadratic, problem, settings.damping)
    price = settings.flip_weight * flip_price(problem, damped)
    return problem.codes(_sweep(problem, damped, price, up, settings.sweeps))


def flip_price(
    problem: RoundingProblem, quadratic: Quadratic
) -> Float64[np.ndarray, "groups rows fan_in"]:
    """Price of agreeing with nearest, for every weight, at flip weight 1.

    In proportion to the rounding error in steps, and over the whole layer as large as the output
    error of nearest rounding: so the weight means the same in every layer and at every bit width.
    """
    error = np.where(problem.free, problem.error, 0)
    nearest = problem.dequantized(problem.codes(problem.nearest_up))
    total = error.sum()
    return error * (quadratic.error(nearest).sum() / total if total > 0 else 0.0)


def _start(
    problem: RoundingProblem, start: str, generator: np.random.Generator
) -> Bool[np.ndarray, "groups rows fan_in"]:
    if start == "stochastic":
        choice = generator.random(problem.weight.shape) < problem.steps - problem.floor
    elif start == "flipped":
        choice = ~problem.nearest_up
    else:
        choice = problem.nearest_up
    return np.where(problem.free, choice, problem.nearest_up)


def _damp(quadratic: Quadratic, problem: RoundingProblem, damping: float) -> Quadratic:
    """`quadratic` plus a small pull of every weight to its float value; never quite singular."""
    weight = problem.weight.astype(np.float64)
    diagonal = np.einsum("gkk->gk", quadratic.gram).mean(axis=1, keepdims=True)
    pull = damping * diagonal  # groups 1
    return Quadratic(
        gram=quadratic.gram + pull[:, :, None] * np.eye(weight.shape[-1]),
        cross=quadratic.cross + pull[:, :, None] * weight,
        energy=quadratic.energy + pull * np.square(weight).sum(-1),
    )


@dataclass(slots=True, eq=False)
class _Flips:
    """What the next flip of each weight would do; laid out groups, fan_in, rows."""

    step: Float64[np.ndarray, "groups fan_in rows"]  # change of the weight
    toll: Float64[np.ndarray, "groups fan_in rows"]  # change of the price; inf where not free
    made: Bool[np.ndarray, "groups fan_in rows"]  # flipped against the start

    def columns(self, block: slice) -> _Flips:
        """The same arrays, seen through a window of columns."""
        return _Flips(self.step[:, block], self.toll[:, block], self.made[:, block])


def _sweep(
    problem: RoundingProblem,
    quadratic: Quadratic,
    price: Float64[np.ndarray, "groups rows fan_in"],
    up: Bool[np.ndarray, "groups rows fan_in"],
    sweeps: int,
) -> Bool[np.ndarray, "groups rows fan_in"]:
    """Flip whatever lowers the objective, column after column, until nothing does."""
    gram = quadratic.gram
    weight = problem.dequantized(problem.codes(up))
    gradient = _by_column(weight @ gram - quadratic.cross)
    above = problem.dequantized(problem.codes(np.ones_like(up)))
    below = problem.dequantized(problem.codes(np.zeros_like(up)))
    toll = np.where(up == problem.nearest_up, -price, price)
    flips = _Flips(
        step=_by_column(np.where(up, below - above, above - below)),
        toll=_by_column(np.where(problem.free, toll, np.inf)),
        made=_by_column(np.zeros_like(up)),
    )
    fan_in = gram.shape[-1]
    for _ in range(sweeps):
        moved = False
        for first in range(0, fan_in, BLOCK):
            block = slice(first, min(first + BLOCK, fan_in))
            delta = _sweep_block(gram[:, block, block], gradient[:, block], flips.columns(block))
            if delta is not None:
                gradient += gram[:, :, block] @ delta
                moved = True
        if not moved:
            break
    return up ^ flips.made.transpose(0, 2, 1)


def _sweep_block(
    gram: Float64[np.ndarray, "groups block block"],
    gradient: Float64[np.ndarray, "groups block rows"],
    flips: _Flips,
) -> Float64[np.ndarray, "groups block rows"] | None:
    """Flip within one block of columns, in `flips`; the change of the weights, None for no change.

    Flipping weight i changes the objective by `step_i (2 gradient_i + step_i G_ii) + toll_i`.
    """
    gradient = gradient.copy()
    delta = np.zeros_like(gradient)
    for j in range(gram.shape[-1]):
        step = flips.step[:, j]
        gain = step * (2 * gradient[:, j] + step * gram[:, j, j, None]) + flips.toll[:, j]
        flip = gain < 0
        if not flip.any():
            continue
        delta[:, j] = np.where(flip, step, 0)
        gradient[:, j + 1 :] += gram[:, j + 1 :, j, None] * delta[:, None, j]
        flips.step[:, j] = np.where(flip, -step, step)
        flips.toll[:, j] = np.where(flip, -flips.toll[:, j], flips.toll[:, j])
        flips.made[:, j] ^= flip
    return delta if delta.any() else None


def _by_column(x: np.ndarray) -> np.ndarray:
    """`groups rows fan_in` to contiguous `groups fan_in rows`."""
    return np.ascontiguousarray(x.transpose(0, 2, 1))
