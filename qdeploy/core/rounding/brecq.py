"""BRECQ: output errors count by what they do to the loss.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR
2021, section 3.3: errors of a unit's output are weighted by the diagonal of its Fisher information,
the squared gradient of the loss there. Trained like AdaRound, which is the same without weights.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from qdeploy.core.rounding.adaround import OutputLoss
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Chosen, Prediction, Training, Unit

BATCH = 64


def fisher_loss(importance: Float32[np.ndarray, "images channels *positions"]) -> OutputLoss:
    """BRECQ's error: squares weighted by `importance`, which is scaled to mean 1."""
    mean = max(float(importance.mean()), float(np.finfo(np.float32).tiny))
    weight = torch.from_numpy(importance / np.float32(mean))

    def loss(got: Tensor, wanted: Tensor, chosen: Chosen) -> Tensor:
        return (weight[chosen] * (got - wanted).square()).sum(1).mean()

    return loss


def brecq_loss(problem: RoundingProblem, training: Training) -> OutputLoss | None:
    """`fisher_loss` of a layer; None where the model's answers are not known."""
    if training.prediction is None:
        return None
    weight = torch.from_numpy(problem.dequantized(nearest(problem)).astype(np.float32))
    return fisher_loss(_squared_gradients(training.unit, weight, training.prediction))


def _squared_gradients(
    unit: Unit, weight: Tensor, prediction: Prediction
) -> Float32[np.ndarray, "images channels *positions"]:
    """BRECQ's weights: of the divergence from the float prediction, the unit holding `weight`."""
    found = []
    for chosen in torch.arange(len(unit.inputs)).split(BATCH):
        with torch.no_grad():
            output = unit.forward(weight, torch.from_numpy(unit.inputs[chosen.numpy()]))
        output = output.detach().requires_grad_()
        answer = prediction.predict(output, chosen).log_softmax(1)
        target = torch.from_numpy(prediction.float_logits[chosen.numpy()]).softmax(1)
        divergence = F.kl_div(answer, target, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, output)
        found.append(gradient.square().numpy())
    return np.concatenate(found)
