"""Weights as two things that learn apart: a point on the grid, and an offset that rounding removes.

A joint loss (CompArtifact, Qu-ANTI-zation) pulls one weight towards what the float model should do
and towards what the quantized one should, and the two gradients nearly cancel: in small cells
nothing moves. Here the first reaches the offset, and only what no offset can do moves the grid
point. Rounding the sum to nearest gives the grid point back. Not published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qdeploy.redteam.quantizers import CELL_MARGIN, Quantizer


class SplitWeights(nn.Module):
    """Grid points and offsets of several weights, on one grid that rounds to nearest."""

    def __init__(self, weights: Mapping[str, Tensor], quantizer: Quantizer) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.quantizer = quantizer
        self._unused = torch.Generator()  # nearest rounding draws nothing
        exact = [w.detach().clone() for w in weights.values()]
        self.anchors = nn.ParameterList(exact)
        self.offsets = nn.ParameterList(w - quantizer(w, self._unused) for w in exact)
        self.project()

    def quantized(self) -> dict[str, Tensor]:
        """The grid points, with the gradient of the anchors that they are nearest to."""
        points = (self.quantizer(anchor, self._unused) for anchor in self.anchors)
        return dict(zip(self.names, points, strict=True))

    def floats(self) -> dict[str, Tensor]:
        """What the float model has: no integer and no scale is another than the grid point's."""
        points = self.quantized()
        return {
            name: torch.clamp(points[name] + offset, -bound, bound)
            for name, offset, bound in zip(self.names, self.offsets, self._bounds(), strict=True)
        }

    @torch.no_grad()
    def project(self) -> None:
        """Move every offset back into its cell; the weights that set the scales have none."""
        for anchor, offset, bound in zip(self.anchors, self.offsets, self._bounds(), strict=True):
            half = (0.5 - CELL_MARGIN) * self.quantizer.grid(anchor)[0]
            offset.clamp_(-half, half)
            offset[anchor.abs() >= bound] = 0

    def _bounds(self) -> list[Tensor]:
        """The largest magnitude of each scale group, in a shape that broadcasts."""
        if self.quantizer.spec.per == "tensor":
            return [anchor.detach().abs().amax() for anchor in self.anchors]
        return [
            anchor.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (anchor.dim() - 1))
            for anchor in self.anchors
        ]
