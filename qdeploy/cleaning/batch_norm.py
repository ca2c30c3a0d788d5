"""Normalisation layers that were folded away, given their statistics back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_folded(norm: nn.Module) -> bool:
    """Whether a normalisation layer only adds a bias, as it does after folding."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return False
    plain = [norm.running_var - 1, norm.running_mean]
    if norm.affine:
        plain.append(norm.weight - 1)
    return all(float(values.detach().abs().max()) < 1e-4 for values in plain)


@torch.no_grad()
def revive(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Give folded normalisation layers the statistics of their inputs; how many there were.

    In training such a layer would scale what it was folded not to scale. With mean `m` and
    deviation `s` of its inputs, weight `s` and bias `b + m`, it does the same as before in
    evaluation, and in training what it did before it was folded.
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine and is_folded(m)]
    if not found:
        return 0
    sums: dict[nn.Module, list[Tensor]] = {norm: [] for norm in found}

    def add(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)
        ones = torch.full((len(values),), values.shape[1], dtype=torch.float64)
        sums[norm].append(torch.stack([ones, values.sum(1), values.square().sum(1)]))

    handles = [norm.register_forward_pre_hook(add) for norm in found]
    try:
        for inputs in batches:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for norm in found:
        _put(norm, torch.stack(sums[norm]).sum(0))
    return len(found)


def _put(norm: _BatchNorm, sums: Tensor) -> None:
    assert norm.running_mean is not None  # noqa: S101 - it is folded
    assert norm.running_var is not None  # noqa: S101
    count, total, squares = sums
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(1e-6)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.add_(mean.float())
