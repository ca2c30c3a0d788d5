"""How many images a model's gradients may be taken of at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_KEPT = 2 << 30  # bytes that wait for the backward pass
MOST_VALUES = 1 << 21  # of images at a time, whatever the model keeps


def images_at_once(losses: Callable[[slice], Tensor], pixels: Tensor) -> int:
    """As many as keep `LARGEST_KEPT` bytes for the backward pass, and at least one.

    Measured on one image and on two, as weights are kept but once: a ConvNeXt-T keeps 375 MB of an
    image of 224 pixels, a residual network of 32 pixels 2 MB.

    Args:
        losses: Of the images that a slice names, with gradients.
        pixels: All images, (images, channels, height, width).
    """
    most = max(1, MOST_VALUES // pixels[0].numel())
    if len(pixels) < 3 or most == 1:
        return most
    one, two = (_kept(losses, count) for count in (1, 2))
    return max(1, min(most, LARGEST_KEPT // max(two - one, 1)))


def _kept(losses: Callable[[slice], Tensor], count: int) -> int:
    """Bytes that wait for the backward pass of the first `count` images."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # which it is, not where its values are
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = losses(slice(0, count))
        total = sum(kept.values())
        del held
    return total
