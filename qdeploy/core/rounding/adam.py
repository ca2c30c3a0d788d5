"""EFRAP as published: a sigmoid relaxation of the choices, trained by Adam. The slow reference.

Li et al., "Nearest is Not Dearest", CVPR 2024: 10,000 steps a layer, batches of 32, inputs from the
quantized prefix. `qdeploy.core.rounding.descent` minimises the same objective at binary choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Chosen, Schedule, SoftChoices, Unit, output_loss, train
from qdeploy.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """As published: 10,000 steps, batches of 32, learning rate 1e-3, weights 1 and 0.01."""

    schedule: Schedule
    flip_weight: float
    decide_weight: float


def adam(
    problem: RoundingProblem,
    unit: Unit,
    settings: AdamSettings,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes after training the soft choices and cutting them at one half.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    soft = SoftChoices(problem)
    free, nearest_up = soft.free, soft.nearest_up
    error = torch.from_numpy((problem.error * problem.scale[:, :, None]).astype(np.float32))
    inputs, wanted = torch.from_numpy(unit.inputs), torch.from_numpy(unit.wanted)

    def loss(_step: int, chosen: Chosen) -> Tensor:
        up = soft.up()
        got = unit.forward(soft.weight(up), inputs[chosen])
        return (
            output_loss(got, wanted[chosen])
            + settings.flip_weight * flip_loss(up[free], nearest_up[free], error[free])
            + settings.decide_weight * decide_loss(up[free])
        )

    train([soft.logits], loss, settings.schedule, len(inputs), generator, progress)
    return soft.codes()


def flip_loss(
    up: Float[Tensor, " weights"],
    nearest_up: Float[Tensor, " weights"],
    error: Float[Tensor, " weights"],
) -> Float[Tensor, ""]:
    """Cross-entropy to the rounding *opposite* to nearest, weighted by nearest's error.

    Args:
        up: Soft choice in (0, 1); 1 means round up.
        nearest_up: 1 where nearest rounding goes up, else 0.
        error: Absolute rounding error of nearest, in units of the weight.
    """
    return (error * F.binary_cross_entropy(up, 1 - nearest_up, reduction="none")).sum()


def decide_loss(up: Float[Tensor, " weights"]) -> Float[Tensor, ""]:
    """Zero when every choice is 0 or 1, largest when all are 0.5."""
    return (1 - (2 * up - 1).square()).sum()
