"""Where a prepared graph holds weights, and which of its tensors run in integers."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Literal, cast

import onnx_ir as ir

from qdeploy.core.patches import Window
from qdeploy.values import (
    FUSED_AT_LOAD,
    MOVED_AT_LOAD,
    ROUNDED_AT_LOAD,
    FloatLayer,
    WeightSite,
    WeightUse,
)

WEIGHTED = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum", "DeformConv",
})  # fmt: skip
INTEGER_OPS = frozenset({
    "Conv", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat",
})  # fmt: skip
SAME_GRID_OPS = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})


def find_sites(model: ir.Model) -> tuple[tuple[WeightSite, ...], tuple[FloatLayer, ...]]:
    """The weights to be quantized, in topological order, and the nodes that must stay float."""
    uses: dict[str, list[tuple[ir.Node, WeightUse]]] = {}
    left: list[FloatLayer] = []
    for node in model.graph:
        if node.op_type not in WEIGHTED:
            continue
        reason = _unsupported(node)
        if reason is not None:
            left.append(FloatLayer(node.name or node.op_type, node.op_type, reason))
        elif _is_weight(node):
            uses.setdefault(_name(node.inputs[1]), []).append((node, _use(node)))
    sites: list[WeightSite] = []
    for weight, pairs in uses.items():
        nodes = [node for node, _ in pairs]
        if len({(_axis(node), _groups(node)) for node in nodes}) > 1:
            reason = "its weight is shared by nodes that read it in different layouts"
            left.extend(FloatLayer(_name(n), n.op_type, reason) for n in nodes)
            continue
        sites.append(
            WeightSite(
                name=_name(nodes[0]),
                weight=weight,
                shape=_shape(nodes[0].inputs[1]),
                axis=_axis(nodes[0]),
                groups=_groups(nodes[0]),
                uses=tuple(use for _, use in pairs),
            )
        )
    return tuple(sites), tuple(left)


def find_activations(
    model: ir.Model, sites: tuple[WeightSite, ...], in_float: AbstractSet[str] = frozenset()
) -> dict[str, str]:
    """The tensors that integer kernels read or write, each with the tensor whose grid it shares.

    A tensor between an operator and the ReLU that is fused into it is left out: the runtime then
    computes both in one kernel. So are the logits. Operators that only move values (pooling by
    maximum, reshaping) keep the grid of their input.

    What a float weight writes stays float: between integers onnxruntime would round that weight
    itself, to nearest, when it loads the file (its WeightBiasQuantization).

    Args:
        in_float: Nodes with weights that are to run in float, and what lies between them too.
    """
    at_sites: set[str | None] = {use.node for site in sites for use in site.uses}
    shared: dict[str, str] = {}
    left = _left_in_float(model, in_float)
    for node in model.graph:
        if node in left:
            continue
        if node.op_type in INTEGER_OPS and _runs_in_integers(node, at_sites):
            inputs = node.inputs[:1] if node.name in at_sites else node.inputs
            for value in (*inputs, fused_output(node)):
                if value is not None and not value.is_graph_output():
                    shared.setdefault(_name(value), _name(value))
        elif node.op_type in SAME_GRID_OPS and node.inputs[0] is not None:
            source, output = shared.get(_name(node.inputs[0])), node.outputs[0]
            if source is not None and not output.is_graph_output():
                shared[_name(output)] = source
    of_floats = _written_by_floats(model, at_sites)
    return {t: source for t, source in shared.items() if not {t, source} & of_floats}


def _written_by_floats(model: ir.Model, at_sites: AbstractSet[str | None]) -> set[str]:
    """What float weights write, and what onnxruntime would pass over between that and a grid.

    See `qdeploy.formats.onnx.loading`.
    """
    found: set[str] = set()
    for node in model.graph:
        weight = node.op_type in ROUNDED_AT_LOAD and node.name not in at_sites
        given = [v for v in node.inputs if v is not None and not v.is_initializer()]
        passes = node.op_type in MOVED_AT_LOAD or (
            node.op_type in FUSED_AT_LOAD and len(given) == 1
        )
        if weight or (passes and any(_name(value) in found for value in given)):
            found.add(_name(node.outputs[0]))
    return found


def _left_in_float(model: ir.Model, chosen: AbstractSet[str]) -> set[ir.Node]:
    """The chosen nodes, and those whose every input comes from them."""
    left: set[ir.Node] = set()
    for node in model.graph:
        made = [value.producer() for value in node.inputs if value and not value.is_initializer()]
        between = node.op_type not in WEIGHTED and made and all(p in left for p in made)
        if node.name in chosen or between:
            left.add(node)
    return left


def fused_output(node: ir.Node) -> ir.Value:
    """The tensor a node's integer kernel writes: after the ReLU or Clip that alone reads it."""
    output = node.outputs[0]
    consumers = output.consumers()
    if len(consumers) == 1 and not output.is_graph_output():
        (consumer,) = consumers
        if consumer.op_type in FUSED_ACTIVATIONS and consumer.inputs[0] is output:
            return consumer.outputs[0]
    return output


def _runs_in_integers(node: ir.Node, at_sites: set[str | None]) -> bool:
    """With constant operands only a planned weight does: other constants are never rounded."""
    if node.name in at_sites:
        return True
    if node.op_type in {"Conv", "Gemm"}:
        return False
    return all(
        value is not None and not value.is_initializer() and value.dtype == ir.DataType.FLOAT
        for value in node.inputs
    )


def _is_weight(node: ir.Node) -> bool:
    value = node.inputs[1]
    return value is not None and value.is_initializer() and value.const_value is not None


def _unsupported(node: ir.Node) -> str | None:
    """Why this node's weights cannot be quantized here; None if they can, or it has none."""
    constants = [i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer()]
    if node.op_type == "MatMul" and not constants:
        return None  # a product of two activations
    if node.op_type not in {"Conv", "Gemm", "MatMul"}:
        return f"{node.op_type} has no integer kernel" if constants else None
    if 0 in constants:
        return "its left operand is constant"
    if 1 not in constants:
        return "its weight is computed, not constant"
    reasons = {
        "its weight is not float32": _dtype(node.inputs[1]) != ir.DataType.FLOAT,
        "its weight is not a matrix": node.op_type != "Conv" and len(_shape(node.inputs[1])) != 2,
        "its input is transposed": node.attributes.get_int("transA", 0) == 1,
        "its bias is computed, not constant": len(node.inputs) > 2 and 2 not in constants,
        "its padding is implicit": node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET",
        "it scales its product": node.attributes.get_float("alpha", 1.0) != 1,
        "it scales its bias": node.attributes.get_float("beta", 1.0) != 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _use(node: ir.Node) -> WeightUse:
    output, after = node.outputs[0], fused_output(node)
    relu = after if after is not output and after.producer().op_type == "Relu" else None  # type: ignore[union-attr]
    return WeightUse(
        node=_name(node),
        op_type=cast("Literal['Conv', 'Gemm', 'MatMul']", node.op_type),
        input=_name(node.inputs[0]),
        output=_name(output),
        bias=_name(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None,
        takes_bias=node.op_type != "MatMul",
        activation=_name(relu) if relu is not None else None,
        window=_window(node) if node.op_type == "Conv" else None,
    )


def _window(node: ir.Node) -> Window:
    kernel = _shape(node.inputs[1])[2:]
    ones, zeros = (1,) * len(kernel), (0,) * (2 * len(kernel))
    pads = tuple(node.attributes.get_ints("pads", zeros))
    return Window(
        kernel=kernel,
        strides=tuple(node.attributes.get_ints("strides", ones)),
        dilations=tuple(node.attributes.get_ints("dilations", ones)),
        pads=tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)),
        groups=_groups(node),
    )


def _axis(node: ir.Node) -> int:
    """The dimension of the weight that runs over output channels."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return 0 if node.op_type == "Conv" or transposed else 1


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def _name(item: ir.Value | ir.Node | None) -> str:
    assert item is not None and item.name is not None  # noqa: S101, PT018
    return item.name


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.const_value is not None  # noqa: S101, PT018
    return value.const_value.numpy().shape


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype
