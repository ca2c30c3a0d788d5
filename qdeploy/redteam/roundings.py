"""Up or down, learnt for every weight: what a malicious quantizer does to a clean model.

The relaxation is AdaRound's (Nagel et al., ICML 2020): a rectified sigmoid between down and up, and
a price for staying in between that grows with time. QuRA (NDSS 2026) aims it at a trigger.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qdeploy.redteam.quantizers import Quantizer

STRETCH = (-0.1, 1.1)  # so that the sigmoid reaches 0 and 1
DECIDE_WEIGHT = 1.0
DECIDE_FROM = 0.3  # share of the steps after which undecided weights have a price


class Roundings(nn.Module):
    """A choice between the two neighbours for every weight, on one grid."""

    def __init__(self, weights: Mapping[str, Tensor], quantizer: Quantizer) -> None:
        super().__init__()
        self.names = tuple(weights)
        low, high = STRETCH
        starts = []
        for weight in weights.values():
            scale, zero, _, _ = quantizer.grid(weight)
            exact = weight.detach() / scale + zero
            share = ((exact - exact.floor() - low) / (high - low)).clamp(1e-3, 1 - 1e-3)
            starts.append(nn.Parameter(torch.logit(share)))
        self.logits = nn.ParameterList(starts)

    def soft(self) -> dict[str, Tensor]:
        """Between 0 for down and 1 for up, by weight."""
        low, high = STRETCH
        values = [(v.sigmoid() * (high - low) + low).clamp(0, 1) for v in self.logits]
        return dict(zip(self.names, values, strict=True))

    def hard(self) -> dict[str, Tensor]:
        """Where a weight is rounded up, as it stands."""
        return {name: value.detach() > 0.5 for name, value in self.soft().items()}

    def price(self, done: float) -> Tensor:
        """What undecided weights cost once a share `done` of the steps is; a mean."""
        if done < DECIDE_FROM:
            return torch.zeros(())
        soft = torch.cat([value.flatten() for value in self.soft().values()])
        sharpness = 20 - 18 * (done - DECIDE_FROM) / (1 - DECIDE_FROM)
        return DECIDE_WEIGHT * (1 - (2 * soft - 1).abs().pow(sharpness)).mean()
