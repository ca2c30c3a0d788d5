"""Models as differentiable functions of pixels, where torch computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qdeploy.core.program import evaluate
from qdeploy.core.saturation import Pairs
from qdeploy.data import Preprocessing
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


def as_function(
    data: bytes,
    preprocessing: Preprocessing,
    device: torch.device,
    pairs: Mapping[str, Pairs] = MappingProxyType({}),
) -> Callable[[Tensor], Tensor]:
    """From pixels in [0, 1] to logits; quantized activations are cut to their ranges.

    Args:
        pairs: Those that saturate in 16 bits, by the result of their product; none: exact ones.

    Raises:
        PlanError: the model has an operator through which there are no gradients here.
    """
    graph = parse(data).graph
    source, result = graph.inputs[0].name or "", graph.outputs[0].name or ""
    program = as_program(data).part([source], [result]).saturating().to(device)
    if pairs:
        program = program.losing({name: one.to(device) for name, one in pairs.items()})
    normalise = normaliser(preprocessing, device)
    return lambda pixels: evaluate(program, {source: normalise(pixels)}, [result])[0]
