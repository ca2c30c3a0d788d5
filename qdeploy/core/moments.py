"""What a layer's rounding error costs, from one stream of activations and in fixed memory.

For rounded weights `W_hat`, inputs `x` and wanted outputs `y`, the mean squared output error is
quadratic in `W_hat` and needs only second moments:

    E |W_hat x - y|^2 = sum over rows of  W_hat G W_hat^T - 2 C W_hat^T + E[y^2],
    G = E[x x^T],  C = E[y x^T]

When a bias may be corrected, the best one is `b = E[y] - W_hat E[x]`, and what is left is the same
formula with the *centred* moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The output error of a layer as a function of its rounded weights, group by group."""

    gram: Float64[np.ndarray, "groups fan_in fan_in"]
    cross: Float64[np.ndarray, "groups rows fan_in"]
    energy: Float64[np.ndarray, "groups rows"]  # mean square (or variance) of the wanted output

    def error(
        self, weight: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        """Mean squared output error of every row when it holds `weight`."""
        error = (weight @ self.gram * weight).sum(-1) - 2 * (self.cross * weight).sum(-1)
        return np.maximum(error + self.energy, 0)

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy
        )


@runtime_checkable
class Moments(Protocol):
    """Sums over the samples that one use of a weight has seen."""

    def quadratic(self, *, centred: bool) -> Quadratic:
        """The error left when the bias is corrected (`centred`) or kept."""
        ...

    def bias_correction(
        self, rounded: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        """What to add to the bias to get the wanted mean output: `E[y] - W_hat E[x]`."""
        ...


class FloatInputMoments:
    """Moments when the layer's inputs are the float model's: the wanted output is `W x`.

    Only `sum x x^T` and `sum x` are kept, as float64; products within a batch are float32.
    """

    def __init__(self, weight: Float32[np.ndarray, "groups rows fan_in"]) -> None:
        groups, _, fan_in = weight.shape
        self._weight = weight.astype(np.float64)
        self._gram = np.zeros((groups, fan_in, fan_in))
        self._sum = np.zeros((groups, fan_in))
        self._count = np.zeros((groups, 1))

    def update(
        self,
        rows: Float32[np.ndarray, "groups samples fan_in"],
        importance: Float32[np.ndarray, "groups samples"] | None = None,
    ) -> None:
        """Add samples; one of importance 2 counts as if it were there twice."""
        if importance is None:
            self._gram += rows.transpose(0, 2, 1) @ rows
            self._sum += rows.sum(axis=1, dtype=np.float64)
            self._count += rows.shape[1]
            return
        weighted = rows * importance[:, :, None]
        self._gram += weighted.transpose(0, 2, 1) @ rows
        self._sum += weighted.sum(axis=1, dtype=np.float64)
        self._count += importance.sum(axis=1, dtype=np.float64)[:, None]

    def quadratic(self, *, centred: bool) -> Quadratic:
        gram = self._gram / self._count[:, :, None]
        if centred:
            mean = self._sum / self._count
            gram = gram - mean[:, :, None] * mean[:, None, :]
        cross = self._weight @ gram
        return Quadratic(gram, cross, np.maximum((cross * self._weight).sum(-1), 0))

    def bias_correction(
        self, rounded: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        mean = self._sum / self._count
        return np.einsum("grk,gk->gr", self._weight - rounded, mean)


class PairedMoments:
    """Moments when inputs come from a quantized prefix, and wanted outputs from the float model."""

    def __init__(self, groups: int, rows: int, fan_in: int) -> None:
        self._gram = np.zeros((groups, fan_in, fan_in))
        self._cross = np.zeros((groups, rows, fan_in))
        self._input_sum = np.zeros((groups, fan_in))
        self._output_sum = np.zeros((groups, rows))
        self._output_square = np.zeros((groups, rows))
        self._count = 0

    def update(
        self,
        rows: Float32[np.ndarray, "groups samples fan_in"],
        wanted: Float32[np.ndarray, "groups samples rows"],
    ) -> None:
        self._gram += rows.transpose(0, 2, 1) @ rows
        self._cross += wanted.transpose(0, 2, 1) @ rows
        self._input_sum += rows.sum(axis=1, dtype=np.float64)
        self._output_sum += wanted.sum(axis=1, dtype=np.float64)
        self._output_square += np.square(wanted, dtype=np.float64).sum(axis=1)
        self._count += rows.shape[1]

    def quadratic(self, *, centred: bool) -> Quadratic:
        gram, cross = self._gram / self._count, self._cross / self._count
        energy = self._output_square / self._count
        if centred:
            x, y = self._input_sum / self._count, self._output_sum / self._count
            gram = gram - x[:, :, None] * x[:, None, :]
            cross = cross - y[:, :, None] * x[:, None, :]
            energy = energy - y**2
        return Quadratic(gram, cross, energy)

    def bias_correction(
        self, rounded: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        x, y = self._input_sum / self._count, self._output_sum / self._count
        return y - np.einsum("grk,gk->gr", rounded, x)
