"""A float graph, grids and chosen codes put together into a QDQ graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qdeploy.core.grids import SMALLEST_SCALE, Grid
from qdeploy.errors import PlanError
from qdeploy.graph import qdq
from qdeploy.graph.io import parse
from qdeploy.values import FloatModel, Grids, QuantPlan, RoundedLayer, WeightSite, WeightUse

LARGEST_BIAS = 2**31 - 1


def assemble(
    model: FloatModel, plan: QuantPlan, grids: Grids, rounded: Mapping[str, RoundedLayer]
) -> ir.Model:
    """The graph with the activations in `grids` and the layers in `rounded` quantized.

    A planned layer that is missing in `rounded` keeps its float weight: so a graph can be
    quantized up to the layer that is being solved.

    Raises:
        PlanError: a bias does not fit into int32.
    """
    result = parse(model.onnx)
    graph = result.graph
    biases = {
        name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value
    }
    outputs = (value for node in graph for value in node.outputs)
    values = {value.name: value for value in (*graph.inputs, *outputs)}
    nodes = {node.name: node for node in graph}
    place = {node: i for i, node in enumerate(graph)}
    for tensor, grid in grids.activations.items():
        qdq.quantize_activation(graph, values[tensor], tensor, grid)
    for layer in plan.layers:
        chosen = rounded.get(layer.site.name)
        if chosen is None:
            continue
        grid = grids.weights[layer.site.name]
        qdq.quantize_weight(graph, layer.site, chosen.codes, grid, layer.storage, place)
        for i, use in enumerate(layer.site.uses):
            correction = chosen.bias_corrections[i] if chosen.bias_corrections else None
            bias = _bias(use, biases, layer.site, correction)
            if bias is not None:
                _emit_bias(graph, nodes[use.node], bias, grid, grids.activations.get(use.input))
    qdq.remove_unused_constants(graph)
    common.TopologicalSortPass()(result)
    common.ShapeInferencePass()(result)
    return result


def _bias(
    use: WeightUse,
    constants: Mapping[str, np.ndarray],
    site: WeightSite,
    correction: np.ndarray | None,
) -> np.ndarray | None:
    """The float64 bias of one node, corrected; None if it has none and needs none."""
    if use.bias is None and correction is None:
        return None
    channels = site.shape[site.axis]
    bias = constants[use.bias].astype(np.float64) if use.bias is not None else np.zeros(channels)
    return bias if correction is None else bias + correction


def _emit_bias(
    graph: ir.Graph, node: ir.Node, bias: np.ndarray, weight: Grid, activation: Grid | None
) -> None:
    if activation is None:
        qdq.set_bias(graph, node, bias)
        return
    scale = np.maximum(weight.scale * activation.scale[0], SMALLEST_SCALE).astype(np.float32)
    codes = np.rint(bias / scale.astype(np.float64))
    if np.abs(codes).max() > LARGEST_BIAS:
        channel = int(np.abs(codes).argmax())
        raise PlanError(
            f"layer {node.name!r}: bias {bias[channel]:.3g} of channel {channel} does not fit into "
            f"int32 at scale {scale[channel]:.3g}"
        )
    qdq.quantize_bias(graph, node, codes.astype(np.int32), scale)
