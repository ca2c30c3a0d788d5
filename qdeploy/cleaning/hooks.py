"""Which layers the attention shift looks at, found by the structure of the network."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from qdeploy.errors import PlanError, UsageError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def watched_layers(model: nn.Module, patterns: Sequence[str], deepest: float) -> tuple[str, ...]:
    """Names of the layers whose values before normalisation and activation are shifted.

    In a network of repeated blocks with two or more convolutions each (ResNet, MobileNetV2,
    DenseNet): the first convolution of every block. In a plain one (VGG, AlexNet): every
    convolution but the first, which sees pixels.

    Args:
        patterns: Shell-style; if there are any, the convolutions and linear layers they name.
        deepest: Share of the layers found by structure, rounded up, that is taken from the end.

    Raises:
        UsageError: a pattern matches no layer.
        PlanError: nothing is found by structure.
    """
    if patterns:
        return _matching(model, patterns)
    found = _first_of_blocks(model) or _convolutions(model)[1:]
    if not found:
        raise PlanError(
            "the attention shift needs convolutions to watch, and finds none",
            hint="name layers whose outputs go into an activation, as --watch 'blocks.*.expand'",
        )
    return tuple(found[-math.ceil(deepest * len(found)) :])


@contextmanager
def watching(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """What the layers called `names` gave in the last call of `model`, for the whole batch."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep(name))  # type: ignore[arg-type]
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _matching(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    layers = [n for n, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise UsageError(
                f"--watch {pattern!r} matches no convolution or linear layer",
                hint=f"have {', '.join(layers[:8])}{', ...' if len(layers) > 8 else ''}",
            )
    return tuple(n for n in layers if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def _first_of_blocks(model: nn.Module) -> list[str]:
    """The first convolution of each smallest module that has several, if its kind is repeated."""
    blocks = {
        name: convolutions
        for name, module in model.named_modules()
        if name and not isinstance(module, CONTAINERS)
        if len(convolutions := _convolutions(module)) > 1
    }
    smallest = [n for n in blocks if not any(other.startswith(f"{n}.") for other in blocks)]
    kinds = Counter(type(model.get_submodule(name)) for name in smallest)
    return [
        f"{name}.{blocks[name][0]}"
        for name in smallest
        if kinds[type(model.get_submodule(name))] > 1
    ]


def _convolutions(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if isinstance(inner, CONVOLUTIONS)]
