"""Which layer feeds which, as torch.export sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

CONVOLUTION = torch.ops.aten.conv2d.default
NORMALISATION = torch.ops.aten.batch_norm.default


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """The operators of a model in evaluation mode, and the modules whose weights they read."""

    model: nn.Module
    nodes: tuple[Node, ...]
    parameters: dict[str, str]  # placeholder -> name of the parameter

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, int, int]) -> Traced:
        """Trace `model` for images of `shape`."""
        program = torch.export.export(model.eval(), (torch.zeros(2, *shape),))
        inputs = program.graph_signature.inputs_to_parameters
        return cls(model, tuple(program.graph.nodes), dict(inputs))

    def convolutions(self) -> Iterator[tuple[Node, nn.Conv2d]]:
        """Every convolution that is a module, with its node."""
        for node in self.nodes:
            module = self.owner(node)
            if node.target is CONVOLUTION and isinstance(module, nn.Conv2d):
                yield node, module

    def owner(self, node: Node) -> nn.Module | None:
        """The module whose weight the node multiplies by."""
        if node.target not in {CONVOLUTION, NORMALISATION}:
            return None
        name = self.parameters.get(str(node.args[1]))
        return None if name is None else self.model.get_submodule(name.rpartition(".")[0])
