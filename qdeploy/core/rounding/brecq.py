"""BRECQ: output errors count by what they do to the loss.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR
2021, section 3.3: errors of a unit's output are weighted by the diagonal of its Fisher information,
the squared gradient of the loss there. Trained like AdaRound, which is the same without weights.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from qdeploy.core.rounding.adaround import OutputLoss
from qdeploy.core.rounding.trained import Chosen


def fisher_loss(importance: Float32[np.ndarray, "images channels *positions"]) -> OutputLoss:
    """BRECQ's error: squares weighted by `importance`, which is scaled to mean 1."""
    mean = max(float(importance.mean()), float(np.finfo(np.float32).tiny))
    weight = torch.from_numpy(importance / np.float32(mean))

    def loss(got: Tensor, wanted: Tensor, chosen: Chosen) -> Tensor:
        return (weight[chosen] * (got - wanted).square()).sum(1).mean()

    return loss
