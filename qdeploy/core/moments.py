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

SAMPLES_AT_ONCE = 512  # of one product, at least
ROWS_AT_ONCE = 256  # of a Gram matrix, where a whole one more would take memory


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The output error of a layer as a function of its rounded weights, group by group.

    Around the float weights `W`, with `D = W_hat - W`, the error is `D G D^T - 2 M D^T + E_0`: what
    is `missing` is `M = C - W G`, nothing where the inputs are the float model's. Moments of
    thousands of samples are uncertain by a thousandth of themselves and more, so that float32 is
    enough for `gram`, and products with it are float32 too; what they add up to is float64.
    """

    gram: Float32[np.ndarray, "groups fan_in fan_in"]
    weight: Float64[np.ndarray, "groups rows fan_in"]
    energy: Float64[np.ndarray, "groups rows"]  # mean square (or variance) of the wanted output
    missing: Float64[np.ndarray, "groups rows fan_in"] | None = None  # None: nothing
    at_weight: Float64[np.ndarray, "groups rows"] | float = 0.0  # error that `weight` leaves

    @classmethod
    def around(
        cls,
        gram: Float64[np.ndarray, "groups fan_in fan_in"],
        weight: Float32[np.ndarray, "groups rows fan_in"],
        cross: Float64[np.ndarray, "groups rows fan_in"],
        energy: Float64[np.ndarray, "groups rows"],
    ) -> Quadratic:
        """Of wanted outputs that `weight` need not give."""
        exact = weight.astype(np.float64)
        got = exact @ gram
        left = energy + ((got - 2 * cross) * exact).sum(-1)
        single = gram.astype(np.float32)
        return cls(single, exact, energy, cross - got, np.maximum(left, 0))

    def slope(
        self, weight: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows fan_in"]:
        """Half the gradient of the error where the layer holds `weight`."""
        moved = (weight - self.weight).astype(np.float32) @ self.gram
        slope = moved.astype(np.float64)
        return slope if self.missing is None else slope - self.missing

    def error(
        self, weight: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        """Mean squared output error of every row when it holds `weight`."""
        pull = self.slope(weight)
        if self.missing is not None:
            pull = pull - self.missing
        error = ((weight - self.weight) * pull).sum(-1) + self.at_weight
        return np.maximum(error, 0)

    def __add__(self, other: Quadratic) -> Quadratic:
        """Of two uses of the same weights."""
        missing = self.missing if other.missing is None else other.missing
        if self.missing is not None and other.missing is not None:
            missing = self.missing + other.missing
        return Quadratic(
            self.gram + other.gram, self.weight, self.energy + other.energy,
            missing, self.at_weight + other.at_weight,
        )  # fmt: skip


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

    Only `sum x x^T` and `sum x` are kept, of samples less what the first ones are on average: so
    their second moments are not lost beside the square of their mean, and float32 suffices.
    """

    def __init__(self, weight: Float32[np.ndarray, "groups rows fan_in"]) -> None:
        groups, _, fan_in = weight.shape
        self._weight = weight
        self._origin: Float32[np.ndarray, "groups 1 fan_in"] | None = None
        self._gram = np.zeros((0, fan_in, fan_in), np.float32)  # none before the first samples
        self._sum = np.zeros((groups, fan_in))
        self._count = np.zeros((groups, 1))
        self._waiting: list[np.ndarray] = []

    def update(
        self,
        rows: Float32[np.ndarray, "groups samples fan_in"],
        importance: Float32[np.ndarray, "groups samples"] | None = None,
    ) -> None:
        """Add samples; one of importance 2 counts as if it were there twice."""
        if self._origin is None:
            self._origin = rows.mean(axis=1, keepdims=True)
        shifted = rows - self._origin
        if importance is None:
            self._sum += shifted.sum(axis=1, dtype=np.float64)
            self._count += rows.shape[1]
        else:
            counts = importance.astype(np.float64)
            self._sum += np.einsum("gs,gsk->gk", counts, shifted)
            self._count += counts.sum(axis=1, keepdims=True)
            shifted *= np.sqrt(importance)[:, :, None]
        self._waiting.append(shifted)
        enough = max(SAMPLES_AT_ONCE, self._sum.shape[1] // 4)
        if sum(part.shape[1] for part in self._waiting) >= enough:
            self._count_waiting()

    def quadratic(self, *, centred: bool) -> Quadratic:
        self._count_waiting()
        gram, mean = self._gram / self._count.astype(np.float32)[:, :, None], self._mean()
        off = self._sum / self._count
        for first in range(0, gram.shape[1], ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            gram[:, some] -= off[:, some, None] * off[:, None, :]
            if not centred:
                gram[:, some] += mean[:, some, None] * mean[:, None, :]
        energy = ((self._weight @ gram).astype(np.float64) * self._weight).sum(-1)
        return Quadratic(gram, self._weight.astype(np.float64), np.maximum(energy, 0))

    def _count_waiting(self) -> None:
        """One large product instead of many small ones, each of which is added to the whole."""
        if self._waiting:
            rows = np.concatenate(self._waiting, axis=1)
            self._waiting.clear()
            product = rows.transpose(0, 2, 1) @ rows
            if len(self._gram):
                self._gram += product
            else:
                self._gram = product

    def _mean(self) -> Float64[np.ndarray, "groups fan_in"]:
        origin = 0.0 if self._origin is None else self._origin[:, 0]
        return self._sum / self._count + origin

    def bias_correction(
        self, rounded: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        return np.einsum("grk,gk->gr", self._weight - rounded, self._mean())


class PairedMoments:
    """Moments when inputs come from a quantized prefix, and wanted outputs from the float model."""

    def __init__(self, weight: Float32[np.ndarray, "groups rows fan_in"]) -> None:
        groups, rows, fan_in = weight.shape
        self._weight = weight
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
        return Quadratic.around(gram, self._weight, cross, energy)

    def bias_correction(
        self, rounded: Float64[np.ndarray, "groups rows fan_in"]
    ) -> Float64[np.ndarray, "groups rows"]:
        x, y = self._input_sum / self._count, self._output_sum / self._count
        return y - np.einsum("grk,gk->gr", rounded, x)
