from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from qdeploy.errors import InputError, ProviderError
from qdeploy.graph.io import identity
from qdeploy.runtime import sessions
from qdeploy.runtime.sessions import (
    available_providers,
    open_session,
    optimized,
)
from qdeploy.values import Interface
from tests.nets import residual_net

without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="onnxruntime has CUDA"
)


def test_a_session_runs_on_the_provider_that_was_asked_for():
    session = open_session(residual_net())
    assert session.inference.get_providers() == ["CPUExecutionProvider"]
    assert session.logits(np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 10)
    assert session.interface(where="net") == Interface((3, 8, 8), 10)


@without_cuda
def test_a_provider_that_is_not_there_is_an_error_and_never_a_cpu_run():
    with pytest.raises(ProviderError, match="cuda is not installed") as error:
        open_session(identity(), "cuda")
    assert "onnxruntime-gpu" in (error.value.hint or "")


@without_cuda
def test_a_provider_that_is_listed_but_cannot_start_is_an_error(monkeypatch):
    """As with onnxruntime-gpu where there is no GPU: the runtime would warn and use the CPU."""
    monkeypatch.setattr(sessions, "available_providers", lambda: ("cpu", "cuda"))
    with pytest.raises(ProviderError, match=r"cuda does not work here: onnxruntime would"):
        open_session(identity(), "cuda")


@pytest.mark.gpu
def test_cuda_runs_the_graph_itself():
    if "cuda" not in available_providers():
        pytest.skip("needs onnxruntime-gpu and a CUDA device")
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    want = open_session(residual_net()).logits(x)
    session = open_session(residual_net(), "cuda")
    assert session.inference.get_providers()[0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(session.logits(x), want, rtol=1e-2, atol=1e-3)


def test_what_onnxruntime_refuses_is_one_line():
    for read in (open_session, optimized):
        with pytest.raises(InputError, match="cannot load the model") as error:
            read(b"no model")
        assert "\n" not in str(error.value)


def test_an_input_of_the_wrong_shape_is_one_line():
    with pytest.raises(ProviderError, match="cannot run the model"):
        open_session(residual_net()).logits(np.zeros((1, 3, 9, 9, 1), np.float32))


def test_the_optimized_graph_is_the_one_that_runs():
    from qdeploy.formats.onnx.nodes import operators

    assert "Relu" in operators(residual_net())
    assert "Relu" not in operators(optimized(residual_net()))  # fused into the convolutions


def test_a_file_with_a_fixed_batch_is_fed_piece_by_piece():
    proto = onnx.ModelProto.FromString(residual_net())
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    x = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    fixed = open_session(proto.SerializeToString())
    assert fixed.fixed_batch == 2
    want = open_session(residual_net()).logits(x)
    np.testing.assert_allclose(fixed.logits(x), want, atol=1e-5)
    assert fixed.interface(where="net") == Interface((3, 8, 8), 10)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("net (float[N,3,4,4] x, float[N,3,4,4] y) => (float[N,3,4,4] z) { z = Add(x, y) }",
         "2 inputs and 1 outputs"),
        ("net (uint8[N,3,4,4] x) => (uint8[N,3,4,4] z) { z = Identity(x) }",
         r"takes tensor\(uint8\)"),
        ("net (float[N,3,H,W] x) => (float[N,3,H,W] z) { z = Identity(x) }", "of fixed size"),
        ("net (float[N,3,4,4] x) => (float[N,3,4,4] z) { z = Identity(x) }",
         r"not float \(batch, classes\)"),
        ("net (float[N,1,2,2] x) => (int64[N,4] z) { a = Flatten(x) z = Cast <to = 7> (a) }",
         "gives int64"),
    ],
)  # fmt: skip
def test_what_is_no_classifier_of_images_is_refused(text, complaint):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    with pytest.raises(InputError, match=complaint):
        open_session(model.SerializeToString()).interface(where="net")


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("saturating", [True, False])
def test_slow_exact_kernels_are_asked_for_where_products_would_saturate(
    monkeypatch, vnni, saturating
):
    flags = frozenset({"avx2", "avx512_vnni"} if vnni else {"avx2"})
    monkeypatch.setattr(sessions, "processor_flags", lambda: flags)
    asked: list[tuple[str, str]] = []
    add = ort.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        ort.SessionOptions, "add_session_config_entry",
        lambda self, key, value: asked.append((key, value)) or add(self, key, value),
    )  # fmt: skip
    open_session(residual_net(), saturating=saturating)
    slow = ("session.x64quantprecision", "1") in asked
    assert slow is (not vnni and not saturating)


SHARED_WEIGHT = """
<ir_version: 8, opset_import: ["" : 13]>
net (float[batch, 2] x) => (float[batch, 2] y) <
    float s = {0.05}, uint8 z = {128}, int8[2, 2] w = {100, -3, 7, 90}, float t = {0.01},
    int8 n = {0}
> {
    a = QuantizeLinear(x, s, z)   b = DequantizeLinear(a, s, z)   c = DequantizeLinear(w, t, n)
    m = MatMul(b, c)
    d = QuantizeLinear(m, s, z)   e = DequantizeLinear(d, s, z)   f = DequantizeLinear(w, t, n)
    y = MatMul(e, f)
}
"""


def test_two_products_may_share_a_weight_where_exact_ones_have_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(sessions, "processor_flags", lambda: frozenset({"avx2"}))
    model = onnx.parser.parse_model(SHARED_WEIGHT).SerializeToString()
    x = np.float32([[1, -2], [0.5, 3]])
    want = open_session(model, optimizations="off").logits(x)
    np.testing.assert_allclose(open_session(model).logits(x), want, rtol=1e-6)


def test_a_file_that_does_not_answer_each_image_is_no_classifier():
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x) => (float[M,4] y)'
        " <int64[1] first = {0}, int64[1] last = {-1}> { y = Slice (x, first, last, first) }"
    )
    session = open_session(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(InputError, match="3 answers to a batch of 4"):
        session.logits(np.zeros((4, 4), np.float32))
