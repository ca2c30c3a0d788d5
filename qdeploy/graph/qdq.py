"""QuantizeLinear and DequantizeLinear: turn a float graph into one that runs in integers.

Weights become integer initializers, so that no runtime rounds them again. Zero points are explicit
everywhere, since kernels for integers are only chosen where they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qdeploy.core.grids import Grid, IntType
from qdeploy.values import WeightSite

STORAGE = {
    IntType.INT4: np.dtype(ml_dtypes.int4),
    IntType.INT8: np.dtype(np.int8),
    IntType.UINT8: np.dtype(np.uint8),
    IntType.INT32: np.dtype(np.int32),
}


def quantize_activation(graph: ir.Graph, value: ir.Value, tensor: str, grid: Grid) -> None:
    """Put QuantizeLinear and DequantizeLinear behind `value`, called `tensor`, for all readers."""
    consumers = list(value.uses())
    scale = _constant(graph, f"{tensor}.scale", grid.scale.reshape(()))
    zero = _constant(graph, f"{tensor}.zero_point", grid.zero_point.astype(np.uint8).reshape(()))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{tensor}.quantize")
    quantize.outputs[0].name = f"{tensor}.quantized"
    dequantize = _dequantize(tensor, quantize.outputs[0], scale, zero)
    producer = value.producer()
    if producer is None:
        for node in (dequantize, quantize):
            graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, (quantize, dequantize))
    for node, index in consumers:
        node.replace_input_with(index, dequantize.outputs[0])


def quantize_weight(
    graph: ir.Graph,
    site: WeightSite,
    codes: np.ndarray,
    grid: Grid,
    storage: IntType,
    place: Mapping[ir.Node, int],
) -> None:
    """Replace the site's float weight by `codes` and one DequantizeLinear for all its uses.

    It is put before the first of them in the order of `place`.
    """
    float_weight = graph.initializers[site.weight]
    dtype = STORAGE[storage]
    weight = _constant(graph, f"{site.weight}.quantized", codes.astype(dtype))
    scale = _constant(graph, f"{site.weight}.scale", grid.scale)
    zero = _constant(graph, f"{site.weight}.zero_point", grid.zero_point.astype(dtype))
    dequantize = _dequantize(site.weight, weight, scale, zero, axis=site.axis)
    first = min(float_weight.consumers(), key=place.__getitem__)
    graph.insert_before(first, dequantize)
    float_weight.replace_all_uses_with(dequantize.outputs[0])
    del graph.initializers[site.weight]


def set_bias(graph: ir.Graph, node: ir.Node, bias: np.ndarray) -> None:
    """Give a Conv or Gemm a float bias of its own."""
    _set_input(node, 2, _constant(graph, f"{node.name}.bias_corrected", bias.astype(np.float32)))


def quantize_bias(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> None:
    """Give a Conv or Gemm an int32 bias, `scale` being input scale times weight scale.

    int32 has no zero point: the standard wants none there.
    """
    name = f"{node.name}.bias"
    bias = _constant(graph, f"{name}.quantized", codes.astype(np.int32))
    dequantize = _dequantize(name, bias, _constant(graph, f"{name}.scale", scale), None, axis=0)
    graph.insert_before(node, dequantize)
    _set_input(node, 2, dequantize.outputs[0])


def remove_unused_constants(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def stored_codes(constants: Mapping[str, np.ndarray], site: WeightSite) -> np.ndarray | None:
    """The integers a file holds for `site`; None if it holds none."""
    codes = constants.get(f"{site.weight}.quantized")
    return None if codes is None else codes.astype(np.int32)


def _dequantize(
    name: str, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, *, axis: int | None = None
) -> ir.Node:
    inputs = [codes, scale] if zero is None else [codes, scale, zero]
    attributes = {} if axis is None else {"axis": axis}
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}.dequantize")
    node.outputs[0].name = f"{name}.dequantized"
    return node


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.asarray(values), name=name))
    graph.register_initializer(value)
    return value


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
