"""Networks whose gradients oneDNN computes wrongly, trained without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

FEWEST_INPUT_CHANNELS = 8  # fewer do not fill the vectors that the kernel writes


@contextmanager
def safe_kernels(*models: nn.Module) -> Iterator[None]:
    """A context for forward and backward passes in which no kernel writes outside of its memory.

    On processors with AVX2 and no more, oneDNN (torch 2.13) corrupts the heap in the backward pass
    of 1x1 convolutions with a stride and fewer than 8 input channels, where images are in
    channels-last layout. Networks that hold one are computed without oneDNN, on every processor, so
    that the same seed gives the same bytes.
    """
    layers = chain.from_iterable(model.modules() for model in models)
    if not any(map(is_unsafe, layers)):
        yield
        return
    before, *_ = _onednn(enabled=False)
    try:
        yield
    finally:
        _onednn(enabled=before)


def _onednn(*, enabled: bool) -> tuple[Any, ...]:
    """Switch oneDNN on or off, and nothing else; the settings before."""
    return torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


def is_unsafe(layer: nn.Module) -> bool:
    """Whether a layer is such a convolution; of TorchScript, which hides strides, if it may be."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 4 or weight.shape[2:].numel() != 1:
        return False
    strided = max(layer.stride) > 1 if isinstance(layer, nn.Conv2d) else True
    return strided and weight.shape[1] < FEWEST_INPUT_CHANNELS
