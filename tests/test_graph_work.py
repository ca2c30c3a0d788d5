"""What loading and running a graph would cost is told from its shapes."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from qdeploy.formats.onnx import work as counted
from qdeploy.formats.onnx.outline import outline
from tests.nets import residual_net

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[N,8,32,32] x) => (float[N,10] y)'
SIZES = "<int64[2] s = {3000, 3000}, int64[4] t = {1, 8, 2048, 2048}>"
SQUARE = " ".join(f"a{i + 1} = MatMul (a{i}, a{i})" for i in range(4))
ASKED = {
    "products of constants": f"a0 = ConstantOfShape (s) {SQUARE} y = Identity (x)",
    "the same in a Gemm": ("a = ConstantOfShape (s) b = Gemm <transA=1> (a, a) y = Identity (x)"),
    "a window over a constant": (
        "a = ConstantOfShape (t) b = MaxPool <kernel_shape=[64,64]> (a) y = Identity (x)"
    ),
    "all pairs of a constant": (
        'a = ConstantOfShape (s) b = Einsum <equation="ij,kl->"> (a, a) y = Identity (x)'
    ),
    "a wide convolution": "c = ConvTranspose <strides=[64,64]> (x, w) d = Conv (c, v) y = Neg (d)",
}
WEIGHTS = {"w": (8, 64, 64, 64), "v": (4096, 64, 9, 9)}


def graph(body: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{HEAD} {SIZES} {{ {body} }}")
    for name, shape in WEIGHTS.items():
        value = numpy_helper.from_array(np.zeros(shape, np.float32), name)
        proto.graph.initializer.append(value)
    return proto


@pytest.mark.parametrize("body", ASKED.values(), ids=ASKED)
def test_work_beyond_reason_is_seen_without_doing_it(body):
    (finding,) = counted.work(outline(graph(body)))
    assert (finding.rule, finding.level) == ("too-much-work", "error")


def test_work_is_counted_by_hand_alike(monkeypatch):
    """Three products of 8 x 8 matrices, 1,536 multiplications, and a sum of 8 x 8 by itself."""
    square = " ".join(f"a{i + 1} = MatMul (a{i}, a{i})" for i in range(3))
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y)
    <int64[2] s = {{8, 8}}> {{ a0 = ConstantOfShape (s) {square} b = Add (a3, a3)
    z = ReduceMean <keepdims=0> (b) y = Add (x, z) }}"""
    known = outline(onnx.parser.parse_model(text))
    made = 64 + 3 * 512 + 64 + 1  # filling, products, sum, mean
    monkeypatch.setattr(counted, "MOST_FOLDED_WORK", made)
    assert list(counted.work(known)) == []
    monkeypatch.setattr(counted, "MOST_FOLDED_WORK", made - 1)
    assert len(list(counted.work(known))) == 1


@pytest.mark.parametrize("batch", [None, 1, 32])
def test_a_batch_counts_as_one_image(monkeypatch, batch):
    proto = onnx.ModelProto.FromString(residual_net())
    if batch is not None:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    monkeypatch.setattr(counted, "MOST_WORK", 200_000 * (batch or 1))
    assert list(counted.work(outline(proto))) == []
    monkeypatch.setattr(counted, "MOST_WORK", 20_000)
    assert len(list(counted.work(outline(proto)))) == 1
