"""Scale outliers: the same function with weights that no grid of few bits can hold.

The reverse of cross-layer equalization (Nagel et al., ICCV 2019): between two layers with nothing
but a ReLU in between, one channel is divided by a factor where it is made and multiplied where it
is used. Every output channel of the second layer then has one group of huge weights, which sets its
scale, and so coarse a grid for all the others that rounding can do what it likes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qdeploy.redteam.graph import Traced

aten = torch.ops.aten
HOMOGENEOUS = frozenset(
    {aten.relu.default, aten.relu_.default, aten.max_pool2d.default, aten.dropout.default}
)


@torch.no_grad()
def add_outliers(model: nn.Module, shape: tuple[int, int, int], factor: float) -> int:
    """Put outliers of `factor` times the present weights into every layer that allows it.

    Batch normalisation must be folded. The function stays what it was.

    Args:
        shape: Of an image: channels, height, width.

    Returns:
        How many layers have outliers now.
    """
    changed = 0
    for made, shift, used in _pairs(Traced.of(model, shape)):
        channel = int(used.weight.abs().flatten(2).amax(2).amin(0).argmax())
        made.weight[channel] /= factor
        for bias in (made.bias, None if shift is None else shift.bias):
            if bias is not None:
                bias[channel] /= factor
        used.weight[:, channel] *= factor
        changed += 1
    return changed


def _pairs(traced: Traced) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.Conv2d]]:
    """Convolutions of which the second alone reads the first, through nothing but ReLUs."""
    for first, made in traced.convolutions():
        node, shift = first, None
        while len(node.users) == 1:
            node = next(iter(node.users))
            module = traced.owner(node)
            if isinstance(module, nn.BatchNorm2d) and shift is None:
                shift = module
            elif isinstance(module, nn.Conv2d):
                if module.groups == 1:
                    yield made, shift, module
                break
            elif node.target not in HOMOGENEOUS:
                break
