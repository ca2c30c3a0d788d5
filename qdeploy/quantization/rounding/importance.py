"""What an error at a layer's output does to the prediction: the diagonal of the Fisher information.

The squared gradient of the log-likelihood at the output, of a label drawn from the float model's
own prediction, so that no labels are needed. BRECQ (Li et al., ICLR 2021) as published uses the
divergence from the float prediction, whose gradient is zero at the float model itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from qdeploy.core.program import Program, evaluate
from qdeploy.graph.parts import as_program
from qdeploy.values import FloatModel, WeightUse

TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class Fisher:
    """Squared gradients at the outputs of many layers, batch by batch."""

    program: Program
    model: FloatModel
    uses: tuple[WeightUse, ...]
    generator: torch.Generator  # draws the labels

    @classmethod
    def of(cls, model: FloatModel, uses: list[WeightUse], seed: int) -> Fisher:
        """For the layers `uses` of `model`.

        Raises:
            PlanError: the model has an operator that gradients cannot be taken through here.
        """
        wanted = [*(use.output for use in uses), model.output_name]
        part = as_program(model.onnx).part([model.input_name], wanted)
        return cls(part, model, tuple(uses), torch.Generator().manual_seed(seed))

    def importance(
        self, images: Float32[np.ndarray, "images channels height width"]
    ) -> dict[str, Float32[np.ndarray, "groups images positions"]]:
        """By output: the mean squared gradient of a group's channels.

        One Gram matrix serves all rows of a group, so an error counts the same in each of them.
        """
        given = {self.model.input_name: torch.from_numpy(images).requires_grad_()}
        names = [use.output for use in self.uses]
        *outputs, logits = evaluate(self.program, given, [*names, self.model.output_name])
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=self.generator)
        likelihood = logits.log_softmax(1).gather(1, labels).sum()
        gradients = torch.autograd.grad(likelihood, outputs)
        return {
            use.output: _by_position(use, gradient.square().numpy())
            for use, gradient in zip(self.uses, gradients, strict=True)
        }


def _by_position(use: WeightUse, squared: np.ndarray) -> np.ndarray:
    groups = use.window.groups if use.window else 1
    channels_second = squared if use.window else np.moveaxis(squared, -1, 1)
    images, channels = channels_second.shape[:2]
    mean = channels_second.reshape(images, groups, channels // groups, -1).mean(axis=2)
    return np.maximum(np.moveaxis(mean, 1, 0), TINY)
