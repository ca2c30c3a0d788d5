"""Answers of an arm that was asked about a part of the images, beside one that was asked all.

Where nobody asked, the answer of the same file on the first runtime stands; and since some of them
would have been others, every rate may be off by as many as the drawn ones do not rule out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from qdeploy.core.metrics import unseen_at_most
from qdeploy.values import Arm, Predictions


@dataclass(frozen=True, slots=True)
class Unseen:
    """How many images, of those that an arm was not asked about, it may answer otherwise."""

    clean: int
    triggered: Mapping[str, int]  # by trigger


def part(predictions: Predictions, kept: Bool[np.ndarray, " images"]) -> Predictions:
    """The same of those images alone."""
    return replace(
        predictions,
        labels=predictions.labels[kept],
        clean={arm: found[kept] for arm, found in predictions.clean.items()},
        triggered={
            name: {arm: found[kept] for arm, found in answered.items()}
            for name, answered in predictions.triggered.items()
        },
        ranks={arm: found[kept] for arm, found in predictions.ranks.items()},
    )


def filled(predictions: Predictions, arm: Arm, first: Arm) -> Predictions:
    """The same where the first runtime's answers stand for those that `arm` was not asked for.

    Not so of ranks: where a class agrees, the five behind it need not.
    """
    asked = predictions.asked(arm)
    return replace(
        predictions,
        clean=_with(predictions.clean, arm, first, asked),
        triggered={
            name: _with(answered, arm, first, asked)
            for name, answered in predictions.triggered.items()
        },
        ranks={},
    )


def unseen(
    predictions: Predictions,
    arm: Arm,
    first: Arm,
    counted: Mapping[str, Bool[np.ndarray, " images"]],
) -> Unseen:
    """How many may be others than the first runtime's.

    Args:
        counted: The images that each trigger's success is counted on.
    """
    asked = predictions.asked(arm)

    def at_most(answers: Mapping[Arm, np.ndarray], of: Bool[np.ndarray, " images"]) -> int:
        differ = answers[arm][asked & of] != answers[first][asked & of]
        return unseen_at_most(int(differ.sum()), differ.size, int((of & ~asked).sum()))

    return Unseen(
        at_most(predictions.clean, np.ones(asked.size, bool)),
        {name: at_most(predictions.triggered[name], of) for name, of in counted.items()},
    )


def _with(
    answers: Mapping[Arm, np.ndarray], arm: Arm, first: Arm, asked: Bool[np.ndarray, " images"]
) -> Mapping[Arm, np.ndarray]:
    return {**answers, arm: np.where(asked, answers[arm], answers[first])}
