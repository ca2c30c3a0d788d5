"""How a file lays a matrix out says nothing about what it multiplies by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.graph.io import parse
from qdeploy.provenance.trace import trace
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.methods import EfrapDescent, Nearest
from tests.provenance_lab import changed, quantized, source, x_of


def last_product(graph: ir.Graph) -> ir.Node:
    return [node for node in graph if node.op_type == "Gemm"][-1]


def dequantizer(node: ir.Node) -> ir.Node:
    maker = node.inputs[1].producer()  # type: ignore[union-attr]
    assert maker is not None
    return maker


def through_a_transpose(graph: ir.Graph) -> None:
    node = last_product(graph)
    turn = ir.node("Transpose", [node.inputs[1]], {"perm": [1, 0]}, name="turn")
    graph.insert_before(node, turn)
    node.replace_input_with(1, turn.outputs[0])
    flip(node)


def flip(node: ir.Node) -> None:
    node.attributes["transB"] = ir.AttrInt64("transB", 1 - node.attributes.get_int("transB", 0))


def stored_the_other_way(graph: ir.Graph) -> None:
    node = last_product(graph)
    reader = dequantizer(node)
    codes = reader.inputs[0]
    assert codes is not None and codes.const_value is not None  # noqa: PT018
    turned = np.ascontiguousarray(codes.const_value.numpy().T)
    codes.const_value = ir.tensor(turned, name=codes.name)
    codes.shape = ir.Shape(turned.shape)
    reader.outputs[0].shape = None
    reader.attributes["axis"] = ir.AttrInt64("axis", 1 - reader.attributes.get_int("axis", 1))
    flip(node)


def as_product_and_sum(graph: ir.Graph) -> None:
    node = last_product(graph)
    if node.attributes.get_int("transB", 0) == 1:
        through_a_transpose(graph)
    product = ir.node("MatMul", list(node.inputs[:2]), name="product")
    total = ir.node("Add", [product.outputs[0], node.inputs[2]], name="total")
    new, old = total.outputs[0], node.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(node, (product, total))
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


LAYOUTS: dict[str, Callable[[ir.Graph], None]] = {
    "through a Transpose": through_a_transpose,
    "stored the other way": stored_the_other_way,
    "a product and a sum": as_product_and_sum,
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "matmul"])
def test_the_same_matrix_in_another_layout_is_no_difference(name, change, images):
    model = source(name)
    data = quantized(model, images, Nearest())[0].onnx
    turned = changed(data, change)
    x = x_of(model)
    outputs = [open_session(d, optimizations="off").logits(x) for d in (data, turned)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    found = trace(turned, model)
    assert (found.not_compared, found.differences) == (None, ())
    assert (found.flipped, found.same_network) == (0, True)
    assert len(found.layers) == len(trace(data, model).layers)


def test_a_square_matrix_that_is_turned_is_a_difference(images):
    """It has the same shape either way."""

    def turn_the_square(graph: ir.Graph) -> None:
        node = next(
            n for n in graph if n.op_type == "MatMul" and "gate" in (n.inputs[1].name or "")
        )
        turn = ir.node("Transpose", [node.inputs[1]], {"perm": [1, 0]}, name="turn")
        graph.insert_before(node, turn)
        node.replace_input_with(1, turn.outputs[0])

    model = source("matmul")
    data = changed(quantized(model, images, Nearest())[0].onnx, turn_the_square)
    found = trace(data, model)
    assert found.not_compared is None
    assert not found.same_network


def test_the_nearest_form_of_a_turned_file_keeps_its_layout(images):
    model = source("plain")
    data = changed(quantized(model, images, EfrapDescent())[0].onnx, stored_the_other_way)
    found = trace(data, model)
    assert found.same_network
    assert found.nearest is not None
    assert trace(found.nearest, model).nearest_rounded
    shapes = [
        {n: tuple(v.shape or ()) for n, v in parse(d).graph.initializers.items()}
        for d in (data, found.nearest)
    ]
    assert shapes[0] == shapes[1]
