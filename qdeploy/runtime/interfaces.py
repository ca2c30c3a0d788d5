"""What a file takes and gives, whichever runtime has opened it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import InputError
from qdeploy.values import LARGEST_INPUT_VALUES, Interface

FLOAT = "float32"


@dataclass(frozen=True, slots=True)
class End:
    """One input of a file."""

    name: str
    shape: tuple[int | str | None, ...]  # no number where any size is taken
    dtype: str  # as numpy has it

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that is taken; None for any."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None


def classifier_interface(
    inputs: Sequence[End],
    outputs: int,
    logits: Callable[[np.ndarray], np.ndarray],
    *,
    where: str,
) -> Interface:
    """What the file takes and gives, if it is a classifier of images.

    Raises:
        InputError: it has several inputs, or ends of other shapes or types.
    """
    if len(inputs) != 1 or not outputs:
        raise InputError(
            f"{where}: has {len(inputs)} inputs and {outputs} outputs; a classifier has one input"
        )
    image = inputs[0]
    shape = tuple(size for size in image.shape[1:] if isinstance(size, int))
    if len(image.shape) != 4 or len(shape) != 3 or image.dtype != FLOAT:
        raise InputError(
            f"{where}: takes {image.dtype} of shape {list(image.shape)}, not float32 (batch,"
            " channels, height, width) of fixed size"
        )
    batch = image.fixed_batch or 1
    if math.prod(shape) * batch > LARGEST_INPUT_VALUES:
        raise InputError(f"{where}: takes inputs of shape {list(image.shape)}, which are no images")
    given = logits(np.zeros((batch, *shape), np.float32))
    if given.ndim != 2 or given.dtype.kind != "f":
        raise InputError(
            f"{where}: gives {given.dtype} of shape {given.shape}, not float (batch, classes)"
        )
    return Interface(shape, given.shape[1])


def timed(logits: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> float:
    """Seconds that a runtime on this machine takes to answer a batch."""
    started = time.perf_counter()
    logits(batch)
    return time.perf_counter() - started


def in_batches_of(
    size: int | None, run: Callable[[np.ndarray], np.ndarray], batch: np.ndarray
) -> np.ndarray:
    """The answers to a batch of any size from a file that may take but one: piece by piece.

    Raises:
        InputError: it does not answer each image.
    """
    if size is None or size == len(batch):
        return _one_each(run(batch), batch)
    parts = [batch[at : at + size] for at in range(0, len(batch), size)]
    full = [np.resize(part, (size, *part.shape[1:])) for part in parts]
    return np.concatenate(
        [
            _one_each(run(padded), padded)[: len(part)]
            for part, padded in zip(parts, full, strict=True)
        ]
    )


def _one_each(answers: np.ndarray, batch: np.ndarray) -> np.ndarray:
    if answers.ndim and len(answers) != len(batch):
        raise InputError(
            f"the model gives {len(answers)} answers to a batch of {len(batch)} images"
        )
    return answers
