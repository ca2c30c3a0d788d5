"""Inputs between two classes, found on one runtime and put to another.

After the probes of DcL-BD, a backdoor that compiling a model switches on: what tells runtimes apart
are inputs whose answer hangs on the last digit.
Between two images that are answered differently such an input is found by bisection. Which of the
two classes a runtime gives there says nothing; honest ones differ. A third one, and by far, says
that a small difference of arithmetic has been made into a large one. (Not by far: among a thousand
classes three can meet in one place.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

from qdeploy.runtime.answers import argmax

Logits = Callable[[np.ndarray], np.ndarray]
PAIRS, FEWER_PAIRS = 64, 16  # of small images and of large ones
LARGE = 1 << 16  # values of an image
HALVINGS = 22  # as far as float32 goes
FAR = 0.05  # of the range of an input's logits: honest runtimes differ by half of that
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
    """Which of the inputs are given one of the two classes that meet there, or hardly another."""
    if not len(found.inputs):
        return np.zeros(0, bool)
    given = _logits(logits, found.inputs)
    answers = argmax(given)
    best_of_two = np.take_along_axis(given, found.classes, axis=1).max(axis=1)
    with np.errstate(invalid="ignore"):
        hardly = given.max(axis=1) - best_of_two <= FAR * np.ptp(given, axis=1)
    same: np.ndarray = (answers[:, None] == found.classes).any(axis=1) | (hardly & (answers >= 0))
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
    return argmax(_logits(logits, inputs)) if len(inputs) else np.zeros(0, np.int32)


def _logits(logits: Logits, inputs: np.ndarray) -> np.ndarray:
    each = max(1, AT_ONCE // inputs[0].size)
    return np.concatenate([logits(inputs[i : i + each]) for i in range(0, len(inputs), each)])
