"""Inputs between two classes, found on one runtime and put to another.

After the probes of DcL-BD, a backdoor that compiling a model switches on: what tells runtimes apart
are inputs whose answer hangs on the last digit.
Between two images that are answered differently such an input is found by bisection. Which of the
two classes a runtime gives there says nothing; honest ones differ. A third one says that a small
difference of arithmetic has been made into a large one. Among a thousand classes three can meet in
one place: the quarter of the inputs where, on the first runtime, a third one comes closest are left
out. A quarter it is in any case, whatever a file makes of its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from qdeploy.runtime.answers import argmax

Logits = Callable[[np.ndarray], np.ndarray]
PAIRS, FEWER_PAIRS = 64, 16  # of small images and of large ones
LARGE = 1 << 16  # values of an image
HALVINGS = 22  # as far as float32 goes
KEPT = 0.75  # share of the inputs: those where only two classes come close
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
    inputs = np.concatenate([here, there])
    return _between_two(logits, Boundary(inputs, np.concatenate([classes, classes])))


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


def _between_two(logits: Logits, found: Boundary) -> Boundary:
    """Those of the inputs where all other classes are far behind, in the order they were in."""
    if not len(found.inputs):
        return found
    given = _logits(logits, found.inputs)
    own = np.take_along_axis(given, found.classes, axis=1).min(axis=1)
    others = given.copy()
    np.put_along_axis(others, found.classes, -np.inf, axis=1)
    behind = own - others.max(axis=1)  # no numbers sort last, and are kept
    kept = np.sort(np.argsort(behind)[len(behind) - round(KEPT * len(behind)) :])
    return Boundary(found.inputs[kept], found.classes[kept])


def _answers(logits: Logits, inputs: np.ndarray) -> np.ndarray:
    return argmax(_logits(logits, inputs)) if len(inputs) else np.zeros(0, np.int32)


def _logits(logits: Logits, inputs: np.ndarray) -> Float[np.ndarray, "inputs classes"]:
    each = max(1, AT_ONCE // inputs[0].size)
    return np.concatenate([logits(inputs[i : i + each]) for i in range(0, len(inputs), each)])
