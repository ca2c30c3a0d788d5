"""Models as differentiable functions of pixels, where torch computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qdeploy.core.program import evaluate
from qdeploy.core.saturation import Pairs, Patches
from qdeploy.data import Preprocessing
from qdeploy.formats.onnx.saturation import Product, Window
from qdeploy.graph.io import parse
from qdeploy.graph.parts import as_program


def accelerator() -> torch.device:
    """The GPU that torch has, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normaliser(preprocessing: Preprocessing, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From pixels in [0, 1] to what the model takes, as `Preprocessing.normalise`."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )

    def normalise(pixels: Tensor) -> Tensor:
        ordered = pixels.flip(1) if preprocessing.bgr else pixels
        return ((ordered - mean) / std).contiguous(memory_format=torch.channels_last)

    return normalise


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
        patches=Patches() if window is None else _patches(window),
        convolution=window is not None,
    )


def _patches(window: Window) -> Patches:
    top, left, bottom, right = window.pads
    return Patches(window.kernel, window.strides, window.dilations, (left, right, top, bottom))


def as_function(
    data: bytes,
    preprocessing: Preprocessing,
    device: torch.device,
    products: Sequence[Product] = (),
) -> Callable[[Tensor], Tensor]:
    """From pixels in [0, 1] to logits; quantized activations are cut to their ranges.

    Args:
        products: Those whose pairs saturate in 16 bits; of none: exact arithmetic.

    Raises:
        PlanError: the model has an operator through which there are no gradients here.
    """
    graph = parse(data).graph
    source, result = graph.inputs[0].name or "", graph.outputs[0].name or ""
    program = as_program(data).part([source], [result]).saturating().to(device)
    if products:
        program = program.losing({one.output: pairs_of(one).to(device) for one in products})
    normalise = normaliser(preprocessing, device)
    return lambda pixels: evaluate(program, {source: normalise(pixels)}, [result])[0]
