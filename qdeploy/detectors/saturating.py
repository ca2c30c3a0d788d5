"""The products of a file that can saturate, as the search computes them."""

from __future__ import annotations

import numpy as np
import torch

from qdeploy.core import patches
from qdeploy.core.saturation import Pairs
from qdeploy.formats.onnx.saturation import Product, Window, products
from qdeploy.messages.encoded import decode


def saturating_pairs(standard: bytes) -> dict[str, Pairs]:
    """By the name of a product's result, its pairs that can leave 16 bits.

    Args:
        standard: A file in standard operators.
    """
    found = products(decode(standard))
    return {one.output: pairs_of(one) for one in found if one.saturable.any()}


def pairs_of(product: Product) -> Pairs:
    """The pairs of a product of integers that can saturate."""
    row, pair = (torch.from_numpy(found) for found in np.nonzero(product.saturable))
    weights = torch.from_numpy(product.weights.astype(np.float32))
    inner = torch.stack([2 * pair, 2 * pair + 1])
    scale = torch.from_numpy(np.array(product.scale, np.float32))
    window, rows = product.window, len(weights)
    each = inner.max().item() + 1 if window is None else window.channels(weights.shape[1])
    first = 0 if window is None else row // (rows // window.groups) * each
    return Pairs(
        row=row,
        places=inner // each,
        channels=first + inner % each,
        weights=torch.stack([weights[row, place] for place in inner]),
        scale=scale[row],
        rows=rows,
        step=product.step,
        zero_point=product.zero_point,
        window=None if window is None else _as_patches_are_taken(window),
    )


def _as_patches_are_taken(window: Window) -> patches.Window:
    top, left, bottom, right = window.pads
    pads = (top, bottom), (left, right)
    return patches.Window(window.kernel, window.strides, window.dilations, pads, window.groups)
