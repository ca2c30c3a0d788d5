"""A layer of the graph as a torch function of its weights, for the published solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qdeploy.core.rounding.adam import AdamSettings, Unit, adam
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.model import WeightSite, WeightUse
from qdeploy.progress import Progress
from qdeploy.recipe import EfrapAdam

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def make_unit(
    site: WeightSite,
    use: WeightUse,
    bias: np.ndarray | None,
    inputs: np.ndarray,
    wanted: np.ndarray,
) -> Unit:
    """The node with its bias and the ReLU behind it, for `inputs` and the outputs `wanted`."""
    constant = None if bias is None else torch.from_numpy(bias.copy())

    def forward(weight: Tensor, x: Tensor) -> Tensor:
        if use.window:
            y = _convolve(site, use, weight, x, constant)
        else:
            y = F.linear(x, weight[0], constant).movedim(-1, 1)
        return F.relu(y) if use.activation else y

    return Unit(forward, inputs, wanted if use.window else np.moveaxis(wanted, -1, 1))


def train(
    problem: RoundingProblem, unit: Unit, spec: EfrapAdam, seed: Sequence[int], progress: Progress
) -> np.ndarray:
    """The codes the published solver chooses.

    Raises:
        DivergedError: its loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1)[0])
    )
    settings = AdamSettings(
        spec.steps, spec.batch, spec.learning_rate, spec.flip_weight, spec.decide_weight
    )
    return adam(problem, unit, settings, generator, progress)


def _convolve(
    site: WeightSite, use: WeightUse, weight: Tensor, x: Tensor, bias: Tensor | None
) -> Tensor:
    window = use.window
    assert window is not None  # noqa: S101 - the caller has looked
    pads = [size for before_after in reversed(window.pads) for size in before_after]
    return CONVOLUTIONS[len(window.kernel)](
        F.pad(x, pads),
        weight.reshape(site.shape),
        bias,
        stride=window.strides,
        dilation=window.dilations,
        groups=window.groups,
    )
