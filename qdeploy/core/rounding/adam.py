"""EFRAP as published: a sigmoid relaxation of the choices, trained by Adam. The slow reference.

Li et al., "Nearest is Not Dearest", CVPR 2024: 10,000 steps a layer, batches of 32, inputs from the
quantized prefix. `qdeploy.core.rounding.descent` minimises the same objective at binary choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """As published: 10,000 steps, batches of 32, learning rate 1e-3, weights 1 and 0.01."""

    steps: int
    batch: int
    learning_rate: float
    flip_weight: float
    decide_weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A layer with the activation function that follows it, as a function of its weights."""

    forward: Callable[[Float[Tensor, "groups rows fan_in"], Float[Tensor, "batch ..."]], Tensor]
    inputs: Float32[np.ndarray, "images ..."]  # from the quantized prefix
    wanted: Float32[np.ndarray, "images channels *positions"]  # the float unit on float inputs


def adam(
    problem: RoundingProblem,
    unit: Unit,
    settings: AdamSettings,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes after training the soft choices and cutting them at one half.

    A weight that lies on a code already, or next to the end of the grid, has no choice to train.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    floor = torch.from_numpy(problem.floor.astype(np.float32))
    scale = torch.from_numpy(problem.scale)[:, :, None]
    error = torch.from_numpy((problem.error * problem.scale[:, :, None]).astype(np.float32))
    nearest_up = torch.from_numpy(problem.nearest_up.astype(np.float32))
    free = torch.from_numpy(problem.free)
    inputs, wanted = torch.from_numpy(unit.inputs), torch.from_numpy(unit.wanted)

    fraction = torch.from_numpy(problem.steps).float() - floor
    logits = torch.where(free, torch.logit(fraction, eps=1e-6), 0.0).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=settings.learning_rate)
    for step in progress.track(range(settings.steps), "adam", total=settings.steps):
        up = torch.where(free, torch.sigmoid(logits), nearest_up)
        codes = (floor + up).clamp(-problem.max_code, problem.max_code)
        chosen = torch.randint(len(inputs), (settings.batch,), generator=generator)
        got = unit.forward(codes * scale, inputs[chosen])
        loss = (
            output_loss(got, wanted[chosen])
            + settings.flip_weight * flip_loss(up[free], nearest_up[free], error[free])
            + settings.decide_weight * decide_loss(up[free])
        )
        if not torch.isfinite(loss):
            raise DivergedError(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return problem.codes(np.where(problem.free, (logits.detach() >= 0).numpy(), problem.nearest_up))


def output_loss(
    got: Float[Tensor, "batch channels *positions"],
    wanted: Float[Tensor, "batch channels *positions"],
) -> Float[Tensor, ""]:
    """Squared error summed over channels, mean over images and positions."""
    return (got - wanted).square().sum(1).mean()


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
