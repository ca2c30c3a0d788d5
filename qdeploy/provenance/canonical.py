"""Two prepared graphs, walked side by side from their outputs: do they compute the same?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32

from qdeploy.formats.onnx.tensors import constant
from qdeploy.graph.prepare import interface
from qdeploy.graph.sites import find_sites
from qdeploy.provenance.clips import activation_difference, cuts_at_zero, nonnegative, unclipped
from qdeploy.provenance.likeness import (
    alike,
    attribute_differences,
    by_a_matrix,
    constants_difference,
    flattens,
    matrix,
)
from qdeploy.values import Finding, WeightSite

MOST_FINDINGS = 20
RULE = "graph-differs"


@dataclass(frozen=True, slots=True, eq=False)
class LayerPair:
    """One use of a weight by the source, and what the file has there."""

    site: WeightSite
    node: str  # of the source
    weight: Float32[np.ndarray, "*shape"]  # the file's
    bias: Float32[np.ndarray, "*channels"] | None  # the file's
    source_weight: Float32[np.ndarray, "*shape"]
    source_bias: Float32[np.ndarray, "*channels"] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a walk along two graphs found."""

    layers: tuple[LayerPair, ...]  # in the source's order
    differences: tuple[Finding, ...]
    cut_at_zero: tuple[str, ...]  # tensors whose negative values only the file cuts, by a range


def compare(source: ir.Model, file: ir.Model, step_of: Callable[[np.ndarray], float]) -> Comparison:
    """Match the nodes of two prepared graphs, beginning with what computes the logits.

    Operators, attributes, who feeds whom and constants must be the same. Weights of layers and
    their biases are paired, not compared. A Relu on what is never negative says nothing.

    Args:
        step_of: Largest step of the grid that a constant of the file was rounded on, 0 for none:
            so far may it lie from the source's.
    """
    walk = _Walk(source, step_of)
    if interface(source)[1::2] != interface(file)[1::2]:
        walk.differ("", f"takes and gives {interface(file)[1::2]}, not {interface(source)[1::2]}")
    ends = zip(source.graph.outputs, file.graph.outputs, strict=False)  # the classes' come first
    walk.pending.extend((*pair, "output") for pair in ends)
    while walk.pending and len(walk.differences) < MOST_FINDINGS:
        walk.visit(*walk.pending.pop())
    if not walk.pending:
        walk.report_unmatched()
    order = {use.node: i for i, site in enumerate(walk.sites) for use in site.uses}
    layers = sorted(walk.layers, key=lambda pair: order[pair.node])
    return Comparison(
        tuple(layers), tuple(walk.differences[:MOST_FINDINGS]), tuple(sorted(walk.cut_at_zero))
    )


@dataclass(slots=True, eq=False)
class _Walk:
    """What was matched so far, and what is still to be looked at."""

    source: ir.Model
    step_of: Callable[[np.ndarray], float]
    sites: tuple[WeightSite, ...] = ()
    site_of: dict[str, WeightSite] = field(default_factory=dict)
    positive: frozenset[ir.Value] = frozenset()
    pending: list[tuple[ir.Value, ir.Value, str]] = field(default_factory=list)
    matched: dict[ir.Node, ir.Node] = field(default_factory=dict)  # both ways
    seen: set[tuple[ir.Value, ir.Value]] = field(default_factory=set)
    layers: list[LayerPair] = field(default_factory=list)
    differences: list[Finding] = field(default_factory=list)
    cut_at_zero: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.sites = find_sites(self.source)[0]
        self.site_of = {use.node: site for site in self.sites for use in site.uses}
        self.positive = nonnegative(self.source.graph)

    def differ(self, where: str, message: str) -> None:
        self.differences.append(Finding(RULE, "error", where, message))

    def visit(self, source: ir.Value, file: ir.Value, reader: str) -> None:
        """Compare what one input of `reader` is in both graphs."""
        want, have = unclipped(source), unclipped(file)
        if not self.follow(want.base, have.base, reader):
            return
        positive = want.base in self.positive
        difference = activation_difference(want, have, positive=positive)
        if difference is not None:
            self.differ(reader, f"what {reader!r} reads is {difference}")
        elif cuts_at_zero(want, have, positive=positive):
            self.cut_at_zero.add(want.base.name or "")

    def follow(self, source: ir.Value, file: ir.Value, reader: str) -> bool:
        """Match the nodes that compute two tensors; False if they are no match."""
        if (source, file) in self.seen:
            return True
        first, second = source.producer(), file.producer()
        if first is None or second is None:
            return self.follow_ends(source, file, reader)
        known = self.matched.get(first), self.matched.get(second)
        if known != (None, None):
            if known == (second, first) and source.index() == file.index():
                return True
            self.differ(
                reader, f"what {reader!r} reads comes from {_label(second)} in the file, which is "
                f"not {_label(first)} of the source",
            )  # fmt: skip
            return False
        if not alike(first, second) or source.index() != file.index():
            self.resume(source, file, reader)
            return False
        self.seen.add((source, file))
        self.matched[first], self.matched[second] = second, first
        self.match(first, second)
        return True

    def follow_ends(self, source: ir.Value, file: ir.Value, reader: str) -> bool:
        """Compare where at least one graph has an image or a constant."""
        want, have = constant(source), constant(file)
        if want is not None and have is not None:
            self.compare_constants(want, have, reader)
            return True
        same = source.is_graph_input() and file.is_graph_input()
        if not same:
            self.differ(
                reader, f"{reader!r} reads {_describe(file)} in the file, {_describe(source)} in "
                "the source",
            )  # fmt: skip
            if source.producer() is not None or file.producer() is not None:
                self.resume(source, file, reader, silent=True)
        return same

    def match(self, source: ir.Node, file: ir.Node) -> None:
        """Compare two nodes of one kind, and plan their inputs."""
        name = source.name or source.op_type
        for key, before, now in attribute_differences(source, file):
            self.differ(
                name,
                f"{name!r} has {key} {_shown(now)} in the file, {_shown(before)} in the source",
            )
        site = self.site_of.get(name)
        if site is not None:
            self.pair(site, source, file)
        inputs = slice(0, 1) if site is not None or flattens(source) else slice(None)
        for want, have in zip_longest(source.inputs[inputs], file.inputs[inputs]):
            if want is not None and have is not None:
                self.pending.append((want, have, name))
            elif want is not have:
                self.differ(name, f"{name!r} has an input in one of source and file only")

    def pair(self, site: WeightSite, source: ir.Node, file: ir.Node) -> None:
        """Keep what two nodes multiply by and add."""
        name = source.name or ""
        matrices = by_a_matrix(source) and by_a_matrix(file)
        weights = [
            matrix(node) if matrices else constant(node.inputs[1]) for node in (source, file)
        ]
        biases = [node.inputs[2] if len(node.inputs) > 2 else None for node in (source, file)]
        if biases[1] is not None and constant(biases[1]) is None:
            self.differ(name, f"the bias of {name!r} is computed in the file, not constant")
            return
        before, now = weights
        if before is None or now is None or before.shape != now.shape:
            shapes = [None if w is None else w.shape for w in weights]
            self.differ(name, f"the weight of {name!r} is {shapes[1]} in the file, not {shapes[0]}")
            return
        want, have = (constant(bias) for bias in biases)
        if want is not None and have is not None and want.shape != have.shape:
            self.differ(name, f"the bias of {name!r} is {have.shape} in the file, not {want.shape}")
            return
        if matrices and site.axis == 1:  # as the source has it
            before, now = np.ascontiguousarray(before.T), np.ascontiguousarray(now.T)
        self.layers.append(LayerPair(site, name, now, have, before, want))

    def compare_constants(self, want: np.ndarray, have: np.ndarray, reader: str) -> None:
        what = constants_difference(want, have, self.step_of)
        if what is not None:
            self.differ(reader, f"{reader!r} reads {what}")

    def resume(
        self, source: ir.Value, file: ir.Value, reader: str, *, silent: bool = False
    ) -> None:
        """Report nodes of different kinds; go on where a node of either graph is one too many."""
        first, second = source.producer(), file.producer()
        if not silent:
            self.differ(
                reader, f"{reader!r} reads {_describe(file)} in the file, {_describe(source)} in "
                "the source",
            )  # fmt: skip
        inner = [unclipped(v).base for v in _variable_inputs(second)]
        outer = [unclipped(v).base for v in _variable_inputs(first)]
        ahead = [(source, v) for v in inner] + [(v, file) for v in outer]
        ahead += list(zip(outer, inner, strict=False))
        for a, b in ahead:
            if self.would_match(a, b):
                self.follow(a, b, reader)
                return

    def would_match(self, source: ir.Value, file: ir.Value) -> bool:
        first, second = source.producer(), file.producer()
        if first is None or second is None:
            return source.is_graph_input() and file.is_graph_input()
        free = first not in self.matched and second not in self.matched
        return free and alike(first, second)

    def report_unmatched(self) -> None:
        """Layers of the source that the file's graph never led to."""
        found = {pair.node for pair in self.layers}
        told = {finding.where for finding in self.differences}
        for node in (node for node in self.site_of if node not in found | told):
            self.differ(node, f"layer {node!r} of the source was not found in the file")


def _variable_inputs(node: ir.Node | None) -> list[ir.Value]:
    if node is None:
        return []
    return [value for value in node.inputs if value is not None and not value.is_initializer()]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def _describe(value: ir.Value) -> str:
    node = value.producer()
    if node is not None:
        return _label(node)
    return "the image" if value.is_graph_input() else "a constant"
