"""A layer of the graph as a torch function of its weights, for the methods that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qdeploy.core.program import Program, evaluate
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Chosen, Prediction, Training, Unit
from qdeploy.progress import Progress
from qdeploy.settings.methods import Trained
from qdeploy.values import WeightSite, WeightUse

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """The float network behind a unit."""

    program: Program
    output: str  # the unit's
    logits: str
    given: Mapping[str, np.ndarray]  # what else it reads, for all images
    float_logits: np.ndarray  # of the float model
    channels_last: bool  # in the unit's output; here they come second

    def part(self) -> Program:
        return self.program.part([*self.given, self.output], [self.logits])

    def values(self, part: Program, chosen: Chosen) -> dict[str, Tensor]:
        """What else the part reads, for some of the images."""
        read = {name for step in part.steps for name in step.inputs}
        index = chosen.numpy()
        found = {n: np.asarray(v[index]) for n, v in self.given.items() if n in read}
        return {name: torch.from_numpy(value) for name, value in found.items()}


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


def train_unit(
    problem: RoundingProblem,
    unit: Unit,
    spec: Trained,
    seed: Sequence[int],
    behind: Behind | None,
    progress: Progress,
) -> np.ndarray:
    """The codes that a training method chooses.

    Raises:
        DivergedError: its loss is no longer finite.
    """
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(state)
    prediction = None if behind is None else _prediction(behind)
    return spec.codes(problem, Training(unit, generator, progress, prediction))


def _prediction(behind: Behind) -> Prediction:
    """The rest of the network as a function of the unit's output."""
    part = behind.part()

    def predict(y: Tensor, chosen: Chosen) -> Tensor:
        output = y.movedim(1, -1) if behind.channels_last else y
        given = behind.values(part, chosen) | {behind.output: output}
        return evaluate(part, given, [behind.logits])[0]

    return Prediction(predict, behind.float_logits)


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
