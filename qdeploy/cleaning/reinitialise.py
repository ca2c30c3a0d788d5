"""Random forgetting, layer by layer: where the student of BCU starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qdeploy.errors import PlanError
from qdeploy.settings.sanitizers import Bcu

SHORTCUT = re.compile(r"shortcut|downsample|skip")


def forgetting(model: nn.Module, spec: Bcu) -> Mapping[str, float]:
    """Which share of each layer's weights is drawn anew, by layer name.

    Layers are convolutions and linear ones in order, without those of shortcuts: the first is the
    stem, the last the head, and those between fall into equal parts, one per `spec.depths`.

    Raises:
        PlanError: there are fewer than two layers.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        and not SHORTCUT.search(name)
    ]
    if len(layers) < 2:
        raise PlanError("bcu: has no layers that can be drawn anew", hint="use asd or kd")
    stem, *between, head = layers
    parts = len(spec.depths)
    shares = {name: spec.depths[i * parts // len(between)] for i, name in enumerate(between)}
    return {stem: spec.stem, **shares, head: spec.head}


@torch.no_grad()
def forget(model: nn.Module, shares: Mapping[str, float], generator: torch.Generator) -> None:
    """Draw a share of each layer's weights anew, in place; normalisation layers stay as they are.

    New values are uniform within `1 / sqrt(fan_in)`, as torch starts such layers.
    """
    for name, share in shares.items():
        layer = model.get_submodule(name)
        fan_in = layer.weight[0].numel()  # type: ignore[index]
        for values in layer.parameters(recurse=False):
            chosen = torch.rand(values.shape, generator=generator) < share
            fresh = _uniform(values, 1 / math.sqrt(fan_in), generator)
            values.copy_(torch.where(chosen, fresh, values))


def _uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(like.shape, generator=generator) - 1) * bound
