"""What methods that train their choices have in common: a unit, a loop, and soft choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.errors import DivergedError
from qdeploy.progress import SILENT, Progress

Chosen = Int64[Tensor, " batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A layer with the activation function that follows it, as a function of its weights."""

    forward: Callable[[Float[Tensor, "groups rows fan_in"], Float[Tensor, "batch ..."]], Tensor]
    inputs: Float32[np.ndarray, "images ..."]  # from the quantized prefix
    wanted: Float32[np.ndarray, "images channels *positions"]  # the float unit on float inputs


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The float network behind a unit."""

    predict: Callable[[Float[Tensor, "batch channels ..."], Chosen], Float[Tensor, "batch classes"]]
    float_logits: Float32[np.ndarray, "images classes"]  # of the float model


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What a method trains a layer with."""

    unit: Unit
    generator: torch.Generator
    progress: Progress
    prediction: Prediction | None = None  # for methods that look at the model's answers


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long is trained, on how many images at a time."""

    steps: int
    batch: int
    learning_rate: float
    anneal: bool = False  # the learning rate falls to 0 along half a cosine; constant otherwise


def train(
    parameters: Sequence[Tensor],
    loss: Callable[[int, Chosen], Float[Tensor, ""]],
    schedule: Schedule,
    images: int,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> None:
    """Lower `loss(step, images chosen)` by Adam, in place.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    optimizer = torch.optim.Adam(list(parameters), lr=schedule.learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(schedule.steps, 1))
    for step in progress.track(range(schedule.steps), "train", total=schedule.steps):
        chosen = torch.randint(images, (schedule.batch,), generator=generator)
        value = loss(step, chosen)
        if not torch.isfinite(value):
            raise DivergedError(f"loss is {value.item()} at step {step}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if schedule.anneal:
            falling.step()


class SoftChoices:
    """For every weight that has a choice a number between 0, down, and 1, up.

    A weight that lies on a code already, or next to the end of the grid, has no choice to train.

    Args:
        stretch: The range of the sigmoid before it is cut to [0, 1]; AdaRound's (-0.1, 1.1) reaches
            both ends, EFRAP's (0, 1) neither.
    """

    def __init__(self, problem: RoundingProblem, stretch: tuple[float, float] = (0.0, 1.0)) -> None:
        self._problem = problem
        self._low, self._width = stretch[0], stretch[1] - stretch[0]
        self._floor = torch.from_numpy(problem.floor.astype(np.float32))
        self._scale = torch.from_numpy(problem.scale)[:, :, None]
        self._bounds = tuple(torch.from_numpy(b).float() for b in (problem.least, problem.most))
        self.nearest_up: Float[Tensor, "groups rows fan_in"] = torch.from_numpy(
            problem.nearest_up.astype(np.float32)
        )
        self.free: Bool[Tensor, "groups rows fan_in"] = torch.from_numpy(problem.free)
        fraction = (torch.from_numpy(problem.steps).float() - self._floor - self._low) / self._width
        self.logits = torch.where(
            self.free, torch.logit(fraction, eps=1e-6), 0.0
        ).requires_grad_()  # the soft weights start at the float weights

    def up(self) -> Float[Tensor, "groups rows fan_in"]:
        """The choices as they stand."""
        soft = torch.sigmoid(self.logits)
        if self._width != 1:
            soft = (soft * self._width + self._low).clamp(0, 1)
        return torch.where(self.free, soft, self.nearest_up)

    def weight(
        self, up: Float[Tensor, "groups rows fan_in"]
    ) -> Float[Tensor, "groups rows fan_in"]:
        """The weights that soft choices stand for."""
        return (self._floor + up).clamp(*self._bounds) * self._scale

    def codes(self) -> Int32[np.ndarray, "groups rows fan_in"]:
        """The codes once every choice is cut at one half."""
        up = (self.logits.detach() >= 0).numpy()
        return self._problem.codes(np.where(self._problem.free, up, self._problem.nearest_up))


def output_loss(
    got: Float[Tensor, "batch channels *positions"],
    wanted: Float[Tensor, "batch channels *positions"],
) -> Float[Tensor, ""]:
    """Squared error summed over channels, mean over images and positions."""
    return (got - wanted).square().sum(1).mean()
