"""A graph taken apart: as a plain program, and as the part that is still to be run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from qdeploy.core.program import Program, Step, program
from qdeploy.graph.io import PRODUCER, initializers, parse, serialize


def as_program(data: bytes) -> Program:
    """The operators of a float model, to be evaluated with gradients."""
    steps = [
        Step(
            node.op_type,
            tuple(value.name or "" if value is not None else "" for value in node.inputs),
            tuple(value.name or "" for value in node.outputs),
            {name: _plain(attribute) for name, attribute in node.attributes.items()},
        )
        for node in parse(data).graph
    ]
    return program(steps, initializers(data))


@dataclass(frozen=True, slots=True)
class Part:
    """Nodes that were not run yet, as a model of their own."""

    model: bytes | None  # None if there is nothing to run
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # what is wanted, and what nodes behind the part will read
    live: frozenset[str]  # of all tensors known then, those that somebody will still read
    names: frozenset[str]  # every tensor the part computes


def next_part(
    data: bytes, known: Iterable[str], done: Iterable[str], wanted: Iterable[str]
) -> Part:
    """The part of a model between the tensors that are `known` and those that are `wanted`.

    Args:
        known: Tensors whose values are at hand.
        done: All tensors ever computed; their nodes are not run again.
    """
    model = parse(data)
    graph = model.graph
    at_hand, computed, targets = set(known), set(done), list(dict.fromkeys(wanted))
    variable = _variable(graph)
    needed = {name for name in targets if name not in at_hand}
    run: list[ir.Node] = []
    for node in reversed(graph):
        if needed.intersection(_names(node.outputs)):
            run.append(node)
            needed.update(n for n in _names(node.inputs) if n not in at_hand)
    names = frozenset(n for node in run for n in _names(node.outputs)) & variable
    after = computed | names
    waiting = [n for n in graph if not after.issuperset(set(_names(n.outputs)) & variable)]
    read = {name for node in waiting for name in _names(node.inputs)}
    read.update(_names(graph.outputs))
    live = frozenset((at_hand | names) & (read | set(targets)))
    inputs = tuple(sorted(at_hand & {n for node in run for n in _names(node.inputs)}))
    outputs = tuple(sorted(names & live))
    if not outputs:
        return Part(None, (), (), live, names)
    values = {v.name: v for v in (*graph.inputs, *(v for n in graph for v in n.outputs))}
    cut = ir.convenience.extract(graph, [values[n] for n in inputs], list(outputs))
    cut.opset_imports.update(graph.opset_imports)
    part = ir.Model(cut, ir_version=model.ir_version, producer_name=PRODUCER)
    return Part(serialize(part), inputs, outputs, live, names)


def _variable(graph: ir.Graph) -> set[str]:
    """The tensors that depend on the model's input."""
    found = set(_names(graph.inputs))
    for node in graph:
        if found.intersection(_names(node.inputs)):
            found.update(_names(node.outputs))
    return found


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    return [value.name for value in values if value is not None and value.name]


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value
