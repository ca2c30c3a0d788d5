"""What constants alone decide is computed, and the usual patterns are made simpler.

onnxscript's optimizer, without what makes it cost more than the graph is long: its one rule of two
end nodes compares every node with every other, and constants are folded by computing them first
and looking at their size afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer._constant_folding import FoldConstantsPass

LARGEST_FOLDED_VALUES = 1 << 18
LARGEST_FOLDED_INPUT_BYTES = 1 << 13
TIMES_FOLDED = 8
ROUNDS = 2
LINEAR = frozenset({
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Flatten", "Gather", "Identity", "Log",
    "Max", "Min", "Mul", "Neg", "Pad", "Pow", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceSum", "ReduceSumSquare", "Reshape", "Slice", "Split", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip
COUNTED = {"ConstantOfShape": 0, "Expand": 1}  # the operand that says the shape of the result


class _Indexed:
    """A rule that is tried only where a node has the operator that its pattern ends with."""

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self._ends_with = rule._target_pattern.output_nodes[0].op_identifier()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **how: Any) -> Any:
        if self._ends_with not in {None, node.op_identifier()}:
            return None
        return self._rule.try_rewrite(model, graph, node, **how)


def indexed(rules: Iterable[Any]) -> tuple[Any, ...]:
    """The rules whose patterns end in one node, none of which is tried in vain."""
    return tuple(_Indexed(r) for r in rules if r._target_pattern.has_single_output_node)


RULES = indexed(rewriter._DEFAULT_REWRITE_RULES)


def simplify(model: ir.Model) -> None:
    """Inline functions, fold constants, and apply the rules, in place."""
    held = _held(model)
    fold = FoldConstantsPass(
        shape_inference=True,
        input_size_limit=LARGEST_FOLDED_INPUT_BYTES,
        output_size_limit=max(LARGEST_FOLDED_VALUES, held),
        should_fold=_Folding(TIMES_FOLDED * held),
    )
    rounds = ir.passes.PassManager(
        [
            fold,
            rewriter.RewritePass(RULES),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ],
        steps=ROUNDS,
        early_stop=True,
    )
    ir.passes.Sequential(
        common.InlinePass(),
        rounds,
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


class _Folding:
    """Which nodes of constants are computed.

    Small ones as the library does. Large ones, which weights go through that are standardized,
    scaled, reshaped or put together, if they do no more than go over their operands, and until
    that has been done `TIMES_FOLDED` times for all that the file holds. None that makes much of
    little.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget

    def __call__(self, node: ir.Node) -> bool | None:
        """True: compute it, False: do not, None: as the library does."""
        given, made = _given(node), _made(node)
        if made > max(LARGEST_FOLDED_VALUES, given):
            return False
        if node.op_type not in LINEAR or 4 * given <= LARGEST_FOLDED_INPUT_BYTES:
            return False if made > LARGEST_FOLDED_VALUES else None
        self.budget -= made + given / 4
        return True if self.budget >= 0 else None


def _held(model: ir.Model) -> int:
    """How many values the constants of a model have."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)


def _given(node: ir.Node) -> int:
    """How many values the operands of a node have."""
    tensors = (value.const_value for value in node.inputs if value is not None)
    return sum(tensor.size for tensor in tensors if tensor is not None)


def _made(node: ir.Node) -> float:
    """How many values a node makes, as its constant operands say; 0 if they do not."""
    held = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs]
    if node.op_type in COUNTED and COUNTED[node.op_type] < len(held):
        return _product(held[COUNTED[node.op_type]])
    if node.op_type == "Tile" and len(held) > 1 and held[0] is not None:
        return held[0].size * _product(held[1])
    if node.op_type == "Range" and all(bound is not None for bound in held):
        start, end, step = (float(bound.numpy().reshape(-1)[0]) for bound in held if bound)
        return abs((end - start) / step) if step else math.inf
    shape = node.outputs[0].shape if node.outputs else None
    if shape is None or not shape.is_static():
        return 0
    return math.prod(float(size) for size in shape.numpy())


def _product(tensor: ir.TensorProtocol | None) -> float:
    if tensor is None or tensor.size > 64:
        return 0 if tensor is None else math.inf
    return float(np.prod(tensor.numpy().astype(np.float64)))
