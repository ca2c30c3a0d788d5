"""Which of a file's integers a prepared graph's float weight was made from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from qdeploy.provenance.stored import StoredTensor

PROPORTIONAL = 1e-5  # of a weight's largest value: noise of a BatchNorm's folding


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Stored integers in the layout of the prepared weight that they became.

    `weight = (code - zero_point) * scale * factor`, where preparing folded a factor per channel in.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]  # of the weight
    transposed: bool
    factor: Float32[np.ndarray, "*broadcastable"]  # 1 where nothing was folded in

    def place(self, values: np.ndarray) -> np.ndarray:
        """Something per code, from the file's layout to the weight's."""
        turned = values.T if self.transposed else values
        return np.ascontiguousarray(turned).reshape(self.shape)

    def unplace(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `place`."""
        stored = self.tensor.held.shape
        return values.reshape(stored[::-1]).T if self.transposed else values.reshape(stored)

    @property
    def codes(self) -> Int32[np.ndarray, "*shape"]:
        """In the weight's layout."""
        return self.place(self.tensor.codes)

    @property
    def scale(self) -> Float32[np.ndarray, "*shape"]:
        """Of each code."""
        return self._spread(self.tensor.grid.scale)

    @property
    def zero_point(self) -> Int32[np.ndarray, "*shape"]:
        """Of each code."""
        return self._spread(self.tensor.grid.zero_point)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return self.place(self.tensor.grid.spread(values, self.tensor.held.shape))


class TensorIndex:
    """A file's stored tensors, found by the floats that they stand for."""

    def __init__(self, tensors: tuple[StoredTensor, ...]) -> None:
        self._by_digest: dict[tuple[int, bytes], tuple[StoredTensor, bool]] = {}
        self._by_size: defaultdict[int, list[StoredTensor]] = defaultdict(list)
        for tensor in tensors:
            values = tensor.values
            self._by_size[values.size].append(tensor)
            self._by_digest.setdefault(_key(values), (tensor, False))
            if values.ndim == 2:
                self._by_digest.setdefault(_key(values.T), (tensor, True))

    def find(self, weight: Float32[np.ndarray, "*shape"], axis: int) -> Placed | None:
        """The tensor that became `weight`: as it is, transposed, or times a factor per channel.

        Args:
            axis: Output channels of `weight`.
        """
        exact = self._by_digest.get(_key(weight))
        if exact is not None:
            one = np.ones((1,) * weight.ndim, np.float32)
            return Placed(exact[0], weight.shape, exact[1], one)
        for tensor in self._by_size[weight.size]:
            for transposed in (False, True) if tensor.held.ndim == 2 else (False,):
                factor = _factor(tensor.values.T if transposed else tensor.values, weight, axis)
                if factor is not None:
                    return Placed(tensor, weight.shape, transposed, factor)
        return None

    def step_of(self, values: np.ndarray) -> float:
        """Largest step of the grid that exactly these values were rounded on; 0 if on none."""
        found = self._by_digest.get(_key(values)) if values.dtype == np.float32 else None
        return 0.0 if found is None else float(np.abs(found[0].grid.scale).max(initial=0))


def _key(values: np.ndarray) -> tuple[int, bytes]:
    data = np.ascontiguousarray(values, np.float32)
    return data.size, hashlib.sha256(data.data).digest()


def _factor(
    values: Float32[np.ndarray, "*stored"], weight: Float32[np.ndarray, "*shape"], axis: int
) -> Float32[np.ndarray, "*broadcastable"] | None:
    """What each channel of `values` is multiplied by to give `weight`; None if nothing does."""
    if values.shape != weight.shape:
        return None
    others = tuple(i for i in range(weight.ndim) if i != axis)
    power = np.square(values, dtype=np.float64).sum(axis=others, keepdims=True)
    product = (values.astype(np.float64) * weight).sum(axis=others, keepdims=True)
    factor = np.divide(product, power, out=np.ones_like(product), where=power > 0)
    far = float(np.abs(values * factor - weight).max(initial=0))
    if not np.any(power > 0) or far > PROPORTIONAL * float(np.abs(weight).max(initial=0)):
        return None
    return factor.astype(np.float32)
