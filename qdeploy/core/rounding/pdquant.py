"""PD-Quant: output errors count, and so does what becomes of the final prediction.

Liu et al., "PD-Quant: Post-Training Quantization Based on Prediction Difference Metric", CVPR 2023.
Trained like AdaRound; every step also runs the float network behind the unit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from qdeploy.core.rounding.adaround import OutputLoss
from qdeploy.core.rounding.trained import Chosen, output_loss


def prediction_loss(
    predict: Callable[[Tensor, Chosen], Float[Tensor, "batch classes"]],
    wanted_logits: Float32[np.ndarray, "images classes"],
    temperature: float,
) -> OutputLoss:
    """PD-Quant's error: the output's, plus the divergence of the final prediction.

    Args:
        predict: The rest of the network behind the unit's output, for the chosen images.
    """
    logits = torch.from_numpy(wanted_logits)

    def loss(got: Tensor, wanted: Tensor, chosen: Chosen) -> Tensor:
        answer = F.log_softmax(predict(got, chosen) / temperature, dim=1)
        target = F.log_softmax(logits[chosen] / temperature, dim=1)
        divergence = F.kl_div(answer, target, reduction="batchmean", log_target=True)
        return output_loss(got, wanted) + divergence

    return loss
