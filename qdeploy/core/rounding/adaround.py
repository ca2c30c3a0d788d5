"""AdaRound: the rounding that disturbs the layer's output least, by a relaxation.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020: the output
error of a layer plus a price for undecided choices that sharpens with time, minimised by Adam over
a rectified sigmoid. It does not look at the direction of nearest rounding. Other methods are the
same with another error (`qdeploy.core.rounding.brecq`, `qdeploy.core.rounding.pdquant`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Chosen, Schedule, SoftChoices, Unit, output_loss, train
from qdeploy.progress import SILENT, Progress

STRETCH = (-0.1, 1.1)

OutputLoss = Callable[[Tensor, Tensor, Chosen], Float[Tensor, ""]]  # got, wanted, which images


@dataclass(frozen=True, slots=True)
class AdaroundSettings:
    """As published: 10,000 steps, weight 0.01, sharpness 20 to 2 after a fifth of the steps."""

    schedule: Schedule
    decide_weight: float
    warm_up: float  # share of the steps before undecided choices have a price
    sharpness: tuple[float, float]  # exponent at the end of the warm-up, and at the end


def adaround(
    problem: RoundingProblem,
    unit: Unit,
    settings: AdaroundSettings,
    generator: torch.Generator,
    progress: Progress = SILENT,
    *,
    error: OutputLoss | None = None,
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes after training the soft choices and cutting them at one half.

    Args:
        error: What the rounding does to the output; the squared error if none is given.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    soft = SoftChoices(problem, STRETCH)
    inputs, wanted = torch.from_numpy(unit.inputs), torch.from_numpy(unit.wanted)

    def loss(step: int, chosen: Chosen) -> Tensor:
        up = soft.up()
        got, want = unit.forward(soft.weight(up), inputs[chosen]), wanted[chosen]
        value = output_loss(got, want) if error is None else error(got, want, chosen)
        exponent = sharpness(step / settings.schedule.steps, settings)
        if exponent is None:
            return value
        return value + settings.decide_weight * decide_loss(up[soft.free], exponent)

    train([soft.logits], loss, settings.schedule, len(inputs), generator, progress)
    return soft.codes()


def sharpness(done: float, settings: AdaroundSettings) -> float | None:
    """The exponent once a share `done` of the steps is; None while undecided choices are free."""
    if done < settings.warm_up:
        return None
    first, last = settings.sharpness
    return first + (last - first) * (done - settings.warm_up) / (1 - settings.warm_up)


def decide_loss(up: Float[Tensor, " weights"], exponent: float) -> Float[Tensor, ""]:
    """Zero when every choice is 0 or 1; flat in the middle for a large exponent."""
    return (1 - (2 * up - 1).abs().pow(exponent)).sum()
