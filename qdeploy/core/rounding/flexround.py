"""FlexRound: weights are divided by learnt factors before they go to the nearest code.

Lee et al., "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
Quantization", ICML 2023: `W_hat = s1 round(W / (s1 S2 s3 s4))`, with a factor of each weight, each
output channel and each input channel. The grid size `s1`, which the authors learn too, is kept
here, so that every method is compared on the same grid. Codes may move by more than one.

The learning rate falls to 0: held constant, weights jump between codes until the last step, and
which of them that one leaves is chance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Chosen, Schedule, Unit, output_loss, train
from qdeploy.progress import SILENT, Progress


def flexround(
    problem: RoundingProblem,
    unit: Unit,
    schedule: Schedule,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> Int32[np.ndarray, "groups rows fan_in"]:
    """Codes after training the factors, which start at 1: at nearest rounding.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    groups, rows, fan_in = problem.weight.shape
    steps = torch.from_numpy(problem.steps)
    scale = torch.from_numpy(problem.scale)[:, :, None]
    least, most = (torch.from_numpy(bound).float() for bound in (problem.least, problem.most))
    shapes = ((groups, rows, fan_in), (groups, rows, 1), (groups, 1, fan_in))
    logs = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    inputs, wanted = torch.from_numpy(unit.inputs), torch.from_numpy(unit.wanted)

    def rounded() -> Float[Tensor, "groups rows fan_in"]:
        divided = steps * torch.exp(-(logs[0] + logs[1] + logs[2]))
        return _straight_through(divided).clamp(least, most)

    def loss(_step: int, chosen: Chosen) -> Tensor:
        return output_loss(unit.forward(rounded() * scale, inputs[chosen]), wanted[chosen])

    train(logs, loss, replace(schedule, anneal=True), len(inputs), generator, progress)
    return problem.at(rounded().detach().numpy().astype(np.float64))


def _straight_through(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` rounded half to even, with the gradient of `x`."""
    return x + (x.round() - x).detach()
