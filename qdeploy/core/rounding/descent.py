"""EFRAP as a binary quadratic problem, solved exactly coordinate by coordinate.

Source of the objective: Li et al., "Nearest is Not Dearest: Towards Practical Defense against
Quantization-conditioned Backdoor Attacks", CVPR 2024, sections 4.2 and 4.3. There a sigmoid
relaxation is trained for 10,000 Adam steps; at binary choices `h` (1 = up) the same objective is

    min over h   error(W_hat)  +  sum_i price_i * [h_i == nearest_i]

where `error` is quadratic (`qdeploy.core.moments`) and the price for agreeing with nearest rounding
grows with the rounding error, the carrier of the attack. Rows are independent and share a Gram
matrix, so every row makes its best flip at the same time; column blocks keep the gradient up to
date with one matrix product per block, as GPTQ does (Frantar et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from qdeploy.core.moments import Quadratic
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError

BLOCK = 96
MOVING = 0.7  # share of rows below which the others are left behind
ROUNDOFF = 1e-9  # of gains whose products are float32, relative to the row's energy


@dataclass(frozen=True, slots=True)
class DescentSettings:
    """At `flip_weight` (mu) 1, agreeing with nearest everywhere costs as much as its error."""

    flip_weight: float
    flip_bound: float  # of that cost, as a share of the output's variance
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

    Deterministic but for the seeded start. Within a block of columns all arithmetic is float64,
    or a flip could be made and unmade for ever; what a block does to the others is float32.

    Raises:
        DivergedError: the inputs were not finite, so that there is nothing to descend.
    """
    if not (np.isfinite(quadratic.gram).all() and np.isfinite(quadratic.energy).all()):
        raise DivergedError("the layer's inputs are not finite on the calibration images")
    up = _start(problem, settings.start, generator)
    damped = _damp(quadratic, settings.damping)
    price = flip_price(problem, damped, settings.flip_weight, settings.flip_bound)
    return problem.codes(_sweep(problem, damped, price, up, settings.sweeps))


def flip_price(
    problem: RoundingProblem, quadratic: Quadratic, weight: float, bound: float
) -> Float64[np.ndarray, "groups rows fan_in"]:
    """Price of agreeing with nearest, for every weight.

    In proportion to the rounding error in steps, and over the whole layer `weight` times the output
    error of nearest rounding: so the weight means the same in every layer and at every bit width.
    But no more than `bound` times the variance of the output: in a layer where nearest loses much,
    a price as large would be paid in wrong answers.
    """
    error = np.where(problem.free, problem.error, 0)
    nearest = problem.dequantized(problem.codes(problem.nearest_up))
    total = error.sum()
    paid = min(weight * quadratic.error(nearest).sum(), bound * quadratic.energy.sum())
    return error * (paid / total if total > 0 else 0.0)


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


def _damp(quadratic: Quadratic, damping: float) -> Quadratic:
    """`quadratic` plus a small pull of every weight to its float value; never quite singular."""
    diagonal = np.einsum("gkk->gk", quadratic.gram)
    pull = damping * diagonal.mean(axis=1, keepdims=True, dtype=np.float64)  # groups 1
    gram = quadratic.gram.copy()
    np.einsum("gkk->gk", gram)[:] += pull
    energy = quadratic.energy + pull * np.square(quadratic.weight).sum(-1)
    return replace(quadratic, gram=gram, energy=energy)


@dataclass(slots=True, eq=False)
class _Flips:
    """What the next flip of each weight would do, for a set of rows."""

    gradient: Float64[np.ndarray, "rows columns"]  # half the slope of the error
    step: Float64[np.ndarray, "rows columns"]  # change of the weight
    toll: Float64[np.ndarray, "rows columns"]  # change of the price; inf where not free
    curvature: Float64[np.ndarray, "rows columns"]  # diagonal of the Gram matrix

    @property
    def gain(self) -> Float64[np.ndarray, "rows columns"]:
        """Change of the objective: `step (2 gradient + step G_ii) + toll`."""
        return self.step * (2 * self.gradient + self.step * self.curvature) + self.toll

    def of(self, rows: Int64[np.ndarray, " some"]) -> _Flips:
        """A copy of some of the rows."""
        return _Flips(self.gradient[rows], self.step[rows], self.toll[rows], self.curvature[rows])

    def put(self, rows: Int64[np.ndarray, " some"], flips: _Flips) -> None:
        """Take some of the rows back."""
        self.gradient[rows], self.step[rows], self.toll[rows] = (
            flips.gradient, flips.step, flips.toll,
        )  # fmt: skip


def _sweep(
    problem: RoundingProblem,
    quadratic: Quadratic,
    price: Float64[np.ndarray, "groups rows fan_in"],
    up: Bool[np.ndarray, "groups rows fan_in"],
    sweeps: int,
) -> Bool[np.ndarray, "groups rows fan_in"]:
    """Flip whatever lowers the objective, block of columns after block, until nothing does."""
    gram, (groups, rows, fan_in) = quadratic.gram, up.shape
    gradient = quadratic.slope(problem.dequantized(problem.codes(up))).astype(np.float32)
    room = np.empty_like(gradient)
    above = problem.dequantized(problem.codes(np.ones_like(up)))
    below = problem.dequantized(problem.codes(np.zeros_like(up)))
    step = np.where(up, below - above, above - below)
    toll = np.where(problem.free, np.where(up == problem.nearest_up, -price, price), np.inf)
    made = np.zeros_like(up)
    diagonal = np.einsum("gkk->gk", gram).astype(np.float64)
    curvature = np.broadcast_to(diagonal[:, None], up.shape)
    group = np.repeat(np.arange(groups), rows)
    least = -ROUNDOFF * quadratic.energy.reshape(-1)
    for _ in range(sweeps):
        moved = False
        for first in range(0, fan_in, BLOCK):
            block = np.s_[:, :, first : first + BLOCK]
            views = (gradient[block], step[block], toll[block], curvature[block])
            flips = _Flips(*(view.astype(np.float64).reshape(groups * rows, -1) for view in views))
            own = gram[block[0], block[2], block[2]].astype(np.float64)
            changed = _descend(own, flips, group, least)
            if not changed.any():
                continue
            delta = np.where(changed, -flips.step, 0).reshape(step[block].shape)
            step[block], toll[block] = (
                values.reshape(delta.shape) for values in (flips.step, flips.toll)
            )
            made[block] ^= changed.reshape(delta.shape)
            _add_product(gradient, delta.astype(np.float32), gram[block[0], block[2]], room)
            moved = True
        if not moved:
            break
    return up ^ made


def _descend(
    gram: Float64[np.ndarray, "groups columns columns"],
    flips: _Flips,
    group: Int64[np.ndarray, " rows"],
    least: Float64[np.ndarray, " rows"],
) -> Bool[np.ndarray, "rows columns"]:
    """Steepest descent within one block of columns, in `flips`: which weights end up flipped.

    In every round each row makes its best flip; rows that have none left drop out, once they are
    many. A gain smaller than roundoff does not count, or a flip could be made and unmade for ever.
    """
    start = flips.step.copy()
    live = np.flatnonzero((flips.gain < least[:, None]).any(axis=1))
    part = flips.of(live)
    while live.size:
        gain = part.gain
        best = gain.argmin(axis=1)
        here = np.flatnonzero(gain[np.arange(live.size), best] < least[live])
        if here.size < MOVING * live.size:
            flips.put(live, part)
            live, best, part = live[here], best[here], part.of(here)
            here = np.arange(live.size)
        best = best[here]
        delta = part.step[here, best]
        part.gradient[here] += gram[group[live[here]], best] * delta[:, None]
        part.step[here, best] = -delta
        part.toll[here, best] *= -1
    changed: np.ndarray = flips.step != start
    return changed


def _add_product(
    gradient: Float32[np.ndarray, "groups rows fan_in"],
    delta: Float32[np.ndarray, "groups rows columns"],
    gram: Float32[np.ndarray, "groups columns fan_in"],
    room: Float32[np.ndarray, "groups rows fan_in"],
) -> None:
    """Bring the gradient up to date with the flips of one block, for the rows that had any.

    Args:
        room: For the product: new memory each time would cost as much as the product itself.
    """
    rows = np.flatnonzero(delta.any(axis=(0, 2)))
    if len(gram) > 1 or 2 * rows.size > delta.shape[1]:
        gradient += np.matmul(delta, gram, out=room)
    else:
        gradient[0, rows] += delta[0, rows] @ gram[0]
