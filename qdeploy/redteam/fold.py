"""Folding batch normalisation without changing the architecture.

Deployers fold it before they quantize, so an attack on the weights must be made on folded ones.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qdeploy.redteam.graph import NORMALISATION, Traced


def fold_batch_norm(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Move every scale into the convolution before it, in place; how many were moved.

    The normalisation stays as a module that only adds a bias: weight 1, mean 0, variance 1 - eps.

    Args:
        shape: Of an image: channels, height, width.
    """
    traced, folded = Traced.of(model, shape), 0
    for node, convolution in traced.convolutions():
        users = list(node.users)
        norm = traced.owner(users[0]) if users[0].target is NORMALISATION else None
        if len(users) == 1 and isinstance(norm, nn.BatchNorm2d):
            _fold(convolution, norm)
            folded += 1
    return folded


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("batch normalisation without running statistics cannot be folded")
    mean, variance = norm.running_mean, norm.running_var
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    conv.weight.copy_(weight)
    if conv.bias is not None:
        conv.bias.zero_()
    norm.weight.fill_(1)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
