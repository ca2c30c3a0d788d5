"""Inputs between two classes, found on one runtime and put to another.

After the probes of DcL-BD, a backdoor that compiling a model switches on: what tells runtimes apart
are inputs whose answer hangs on the last digit.
Between two images that are answered differently such an input is found by bisection. Which of the
two classes a runtime gives there says nothing; honest ones differ. A third one says that a small
difference of arithmetic has been made into a large one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

from qdeploy.runtime.measure import argmax

Logits = Callable[[np.ndarray], np.ndarray]
PAIRS, FEWER_PAIRS = 64, 16  # of small images and of large ones
LARGE = 1 << 16  # values of an image
HALVINGS = 22  # as far as float32 goes
AT_ONCE = 1 << 20  # values that are asked about at a time


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """Inputs on either side of the place where an answer changes, and those two answers."""

    inputs: Float32[np.ndarray, "inputs channels height width"]
    classes: Int32[np.ndarray, "inputs 2"]


def boundary(
    logits: Logits, images: Float32[np.ndarray, "images channels height width"], pairs: int
) -> Boundary:
    """Where the answer changes on the way from an image to one that is answered otherwise.

    Args:
        images: As the file takes them, in an order that is nobody's choice.
        pairs: At most.
    """
    answers = _answers(logits, images)
    first, second = _pairs(answers, pairs)
    here, there = images[first].copy(), images[second].copy()
    of_here = answers[first]
    of_there = answers[second]
    for _ in range(HALVINGS if len(here) else 0):
        between = ((here + there) / 2).astype(np.float32)
        found = _answers(logits, between)
        same = found == of_here
        here[same], there[~same] = between[same], between[~same]
        of_there = np.where(same, of_there, found)
    classes = np.stack([of_here, of_there], axis=1)
    return Boundary(np.concatenate([here, there]), np.concatenate([classes, classes]))


def one_of_two(logits: Logits, found: Boundary) -> Bool[np.ndarray, " inputs"]:
    """Which of the inputs are given one of the two classes that meet there."""
    answers = _answers(logits, found.inputs)
    same: np.ndarray = (answers[:, None] == found.classes).any(axis=1)
    return same


def _pairs(answers: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Images one after the other, each with the next that is answered otherwise."""
    pairs = []
    for i in range(len(answers)):
        others = np.flatnonzero(answers[i:] != answers[i])
        if len(others) and answers[i] >= 0 and answers[i + others[0]] >= 0:
            pairs.append((i, i + int(others[0])))
    first, second = np.array(pairs[:most], np.int64).reshape(-1, 2).T
    return first, second


def _answers(logits: Logits, inputs: np.ndarray) -> np.ndarray:
    if not len(inputs):
        return np.zeros(0, np.int32)
    each = max(1, AT_ONCE // inputs[0].size)
    parts = [inputs[i : i + each] for i in range(0, len(inputs), each)]
    return np.concatenate([argmax(logits(part)) for part in parts])
