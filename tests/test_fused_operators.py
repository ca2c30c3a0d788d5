"""Operators that onnxruntime fuses for itself, and the standard's that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qdeploy.architectures.vit import ViT
from qdeploy.errors import InputError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.fused_operators import standard
from qdeploy.formats.onnx.reading import check, parse_proto
from qdeploy.formats.onnx.rules import inspect
from qdeploy.runtime.sessions import open_session
from qdeploy.values import Loaded, Origin, Stated
from tests.nets import residual_net

BODIES = {
    "Gelu": "y = com.microsoft.Gelu (x)",
    "BiasGelu": "y = com.microsoft.BiasGelu (x, b)",
    "FastGelu": "y = com.microsoft.FastGelu (x)",
    "FastGelu with a bias": "y = com.microsoft.FastGelu (x, b)",
    "QuickGelu": "y = com.microsoft.QuickGelu <alpha = 1.5> (x)",
    "FusedMatMul": "y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (x, w)",
    "FusedGemm": 'y = com.microsoft.FusedGemm <transB = 1, activation = "Relu"> (x, w, b)',
    "leaky FusedGemm": "y = com.microsoft.FusedGemm <transB = 1, alpha = 2.0,"
    ' activation = "LeakyRelu", activation_alpha = 0.3> (x, w, b)',
    "SkipLayerNormalization": "y = com.microsoft.SkipLayerNormalization <epsilon = 0.01>"
    " (x, w, b, b, b)",
    "FusedConv": "s = Constant <value_ints = [4, 1, 2, 2]> () r = Reshape (x, s)"
    ' c = com.microsoft.FusedConv <kernel_shape = [2, 2], activation = "Clip",'
    " activation_params = [-0.5, 0.5]> (r, k) f = Constant <value_ints = [4, 4]> ()"
    " y = Reshape (c, f)",
    "FusedConv with more": "s = Constant <value_ints = [4, 1, 2, 2]> () r = Reshape (x, s)"
    ' c = com.microsoft.FusedConv <kernel_shape = [2, 2], activation = "Relu"> (r, k, b, r4)'
    " f = Constant <value_ints = [4, 4]> () y = Reshape (c, f)",
}


def body(name: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[4,4] x) => (float[4,4] y) <float[4,4] w, float[4] b, float[4,1,2,2] k,
    float[4,4,1,1] r4> {{ {BODIES[name]} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.initializer[:]
    for tensor, shape in (("w", (4, 4)), ("b", (4,)), ("k", (4, 1, 2, 2)), ("r4", (4, 4, 1, 1))):
        values = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor))
    return proto


def answers(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("name", BODIES)
def test_a_fused_operator_is_what_it_was_made_of(name, rng):
    proto = body(name)
    plain = standard(proto, "m")
    assert {node.domain for node in plain.graph.node} == {""}
    x = rng.normal(size=(4, 4)).astype(np.float32)
    np.testing.assert_allclose(answers(plain, x), answers(proto, x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "y = com.microsoft.FusedMatMul <transBatchA = 1> (x, w)",
        'y = com.microsoft.FusedGemm <activation = "Selu"> (x, w, b)',
        "y = com.microsoft.SkipLayerNormalization (x)",
    ],
)
def test_a_way_that_is_not_known_is_an_error_of_the_scan(line, monkeypatch):
    monkeypatch.setitem(BODIES, "odd", line)
    proto = body("odd")
    with pytest.raises(InputError):
        standard(proto, "m")
    assert ("custom-operator", "error") in {(f.rule, f.level) for f in inspect(proto)}
    with pytest.raises(InputError):
        check(proto, "m")


def test_work_cannot_hide_in_a_fused_operator():
    """The same convolutions are too much, whatever they are called."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 64, 41, 41), np.float32), "w")
    for operator in ("Conv", "com.microsoft.FusedConv"):
        line = f"{operator} <pads = [20, 20, 20, 20]>"
        nodes = " ".join(f"v{i + 1} = {line} (v{i}, w)" for i in range(11))
        text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[N,64,500,500] v0) => (float[N,64,500,500] v11) {{ {nodes} }}"""
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.append(weight)
        assert "too-much-work" in {finding.rule for finding in inspect(proto)}


def optimized(data: bytes, folder: Path) -> bytes:
    """The file that onnxruntime writes of its own optimizations, but for those of one processor."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options)
    return (folder / "optimized.onnx").read_bytes()


@pytest.mark.parametrize("network", ["residual", "vit"])
def test_what_onnxruntime_has_optimized_is_exported_as_it_was(network, tmp_path, rng):
    data, shape = residual_net(), (3, 8, 8)
    if network == "vit":
        shape = (3, 16, 16)
        module = ViT(16, size=16, depth=1).eval()
        data = export(Loaded(Origin("", "", ""), module, "module"), stated=Stated(shape)).onnx
    fused = optimized(data, tmp_path)
    proto = parse_proto(fused, "m")
    assert any(node.domain == "com.microsoft" for node in proto.graph.node)
    check(proto, "m")
    model = export(Loaded(Origin("m", "", "ONNX"), proto, "onnx"))
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    want = open_session(data).logits(x)
    np.testing.assert_allclose(open_session(model.onnx).logits(x), want, atol=1e-4)
