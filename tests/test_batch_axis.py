"""No answer to an image may depend on its neighbours; arithmetic on shapes is no such thing."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic

from qdeploy.architectures.mobilenet import MobileNetV2
from qdeploy.architectures.resnet import ResNet18
from qdeploy.architectures.vit import ViT
from qdeploy.formats.onnx.batch_axis import batch_axis

HEAD = '<ir_version: 10, opset_import: ["": 21]> net '
CONSTANTS = """
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64 first = {0}, int64 second = {1},
 float[4] bias = {9, 0, 0, 0}, int64[2] rows = {-1, 4}, int64[2] turned = {4, -1},
 int64[1] far = {9223372036854775807}, float limit = {2}, float[1] grain = {255},
 int64 start = {0}, int64 step = {1}, int64[1] back = {-1}, int64[1] least = {-9223372036854775807},
 int64[4] windows = {-1, 2, 2, 4}, int64[3] whole = {-1, 4, 4}, float[1,1,4] token = {1, 2, 3, 4},
 int64[3] single = {-1, 1, 4}, uint8 zp = {0}, int64 four = {4}, int64 huge = {1000000000000},
 int64[4] columns = {0, 1, 2, 3}, int64[4] shifted = {1, 2, 3, 4}>
"""


def rules(body: str, *, shape: str = "N,4") -> set[str]:
    text = f"{HEAD}(float[{shape}] x) => (float[M,4] y) {CONSTANTS} {{ {body} }}"
    return {finding.rule for finding in batch_axis(onnx.parser.parse_model(text))}


IN_VALUES = {
    "Shape, cast, relu": "s = Shape<start=0, end=1>(x) f = Cast<to=1>(s) d = Sub(limit, f)"
    " r = Relu(d) e = Mul(r, bias) y = Add(x, e)",
    "the same of all sizes": "s = Shape(x) g = Gather(s, first) f = Cast<to=1>(g) y = Mul(x, f)",
    "Size": "s = Size(x) f = Cast<to=1>(s) y = Div(x, f)",
    "through Concat and Slice": "s = Shape(x) c = Concat<axis=0>(one, s) g = Slice(c, one, two)"
    " f = Cast<to=1>(g) y = Add(x, f)",
    "a sum of ones": "s = Shape<start=0, end=1>(x) o = ConstantOfShape(s) t = ReduceSum(o, zero)"
    " y = Add(x, t)",
    "a count": "s = Shape<start=0, end=1>(x) o = ConstantOfShape(s) n = NonZero(o)"
    " f = Cast<to=1>(n) t = ReduceMax<keepdims=0>(f) y = Add(x, t)",
    "numbers of images": "s = Shape(x) g = Gather(s, first) r = Range(start, g, step)"
    " f = Cast<to=1>(r) u = Unsqueeze(f, one) y = Add(x, u)",
    "counting up": "s = Shape<start=0, end=1>(x) o = ConstantOfShape(s) c = CumSum(o, first)"
    " u = Unsqueeze(c, one) y = Add(x, u)",
    "as a condition": "s = Shape(x) g = Gather(s, first) q = Equal(g, step) n = Neg(x)"
    " y = Where(q, n, x)",
    "of another tensor": "r = Relu(x) t = Transpose<perm=[1, 0]>(r) s = Shape<start=1>(t)"
    " f = Cast<to=1>(s) y = Mul(x, f)",
    "as a matrix": "s = Shape<start=0, end=1>(x) f = Cast<to=1>(s) u = Unsqueeze(f, zero)"
    " e = Expand(u, two) k = Mul(u, bias) y = Add(k, x)",
}
ACROSS = {
    "mean of the batch": "m = ReduceMean<keepdims=1>(x, zero) y = Sub(x, m)",
    "mean of everything": "m = ReduceMean<keepdims=1>(x) y = Sub(x, m)",
    "largest image": "i = ArgMax<axis=0, keepdims=0>(x) f = Cast<to=1>(i) y = Add(x, f)",
    "softmax of images": "y = Softmax<axis=0>(x)",
    "running sum": "y = CumSum(x, first)",
    "first image": "g = Gather<axis=0>(x, zero) y = Add(x, g)",
    "slice of images": "g = Slice(x, zero, one, zero) y = Add(x, g)",
    "flip": "y = Slice(x, back, least, zero, back)",
    "swap and reduce": "r = Reshape(x, turned) m = ReduceMean<keepdims=1>(r, one)"
    " u = Reshape(m, one) y = Add(x, u)",
    "transpose and reduce": "t = Transpose<perm=[1, 0]>(x) m = ReduceMax<keepdims=0>(t, one)"
    " y = Add(x, m)",
    "images by images": "t = Transpose<perm=[1, 0]>(x) k = MatMul(x, t) y = MatMul(k, x)",
    "covariance": "y = Gemm<transA=1>(x, x)",
    "one normalization": "y = LayerNormalization<axis=0>(x, bias)",
    "behind the others": "y = Concat<axis=0>(x, x)",
    "the others, from the last": "s = Shape(x) n = Gather(s, first) r = Range(start, n, step)"
    " l = Sub(n, step) i = Sub(l, r) y = Gather<axis=0>(x, i)",
    "its neighbour's values": "s = Shape(x) n = Gather(s, first) r = Range(start, n, step)"
    " k = Mul(r, four) u = Unsqueeze(k, one) i = Add(u, shifted) f = Reshape(x, back)"
    " y = Gather<axis=0>(f, i)",
}
HONEST = {
    "flatten by its shape": "s = Shape<start=0, end=1>(x) t = Concat<axis=0>(s, back)"
    " r = Reshape(x, t) y = Relu(r)",
    "older flatten": "s = Shape(x) g = Gather(s, first) u = Unsqueeze(g, zero)"
    " t = Concat<axis=0>(u, back) y = Reshape(x, t)",
    "scaled by its width": "s = Shape(x) g = Gather(s, second) f = Cast<to=1>(g) q = Sqrt(f)"
    " y = Div(x, q)",
    "zeros of the batch's shape": "s = Shape(x) o = ConstantOfShape(s) y = Add(x, o)",
    "mean of zeros": "s = Shape(x) o = ConstantOfShape(s) m = ReduceMean<keepdims=1>(o, zero)"
    " y = Add(x, m)",
    "softmax of classes": "y = Softmax<axis=1>(x)",
    "slice of features": "y = Slice(x, zero, far, one)",
    "all images": "y = Slice(x, zero, far, zero)",
    "its own place": "s = Shape(x) n = Gather(s, first) r = Range(start, n, step)"
    " y = Gather<axis=0>(x, r)",
    "as_strided": "s = Shape(x) n = Gather(s, first) r = Range(start, n, step) k = Mul(r, four)"
    " u = Unsqueeze(k, one) i = Add(u, columns) f = Reshape(x, back) y = Gather<axis=0>(f, i)",
    "a class token": "u = Reshape(x, single) s = Shape<start=0, end=1>(x)"
    " t = Concat<axis=0>(s, one, one) e = Expand(token, t) c = Concat<axis=1>(e, u)"
    " y = Gather<axis=1>(c, first)",
    "transposed twice": "t = Transpose<perm=[1, 0]>(x) r = Relu(t) y = Transpose<perm=[1, 0]>(r)",
    "attention": "u = Reshape(x, single) t = Transpose<perm=[0, 2, 1]>(u) k = MatMul(t, u)"
    " p = Softmax<axis=-1>(k) v = MatMul(u, p) y = Squeeze(v, one)",
}


@pytest.mark.parametrize("name", IN_VALUES)
def test_the_batchs_size_does_not_become_a_value(name):
    assert rules(IN_VALUES[name]) == {"batch-size-in-values"}


@pytest.mark.parametrize("name", ACROSS)
def test_images_of_a_batch_are_not_mixed(name):
    assert rules(ACROSS[name]) == {"across-batch"}


@pytest.mark.parametrize("name", HONEST)
def test_arithmetic_on_shapes_is_no_finding(name):
    assert rules(HONEST[name]) == set()


@pytest.mark.parametrize("name", [*IN_VALUES, *ACROSS])
def test_a_batch_of_one_has_no_neighbours(name):
    assert rules({**IN_VALUES, **ACROSS}[name], shape="1,4") == set()


def test_windows_of_an_image_are_told_apart_and_joined_again():
    body = (
        "w = Reshape(x, windows) t = Transpose<perm=[0, 2, 1, 3]>(w) r = Softmax<axis=-1>(t)"
        " b = Transpose<perm=[0, 2, 1, 3]>(r) v = Reshape(b, whole)"
        " y = ReduceMean<keepdims=0>(v, one)"
    )
    assert rules(body, shape="N,4,4") == set()
    assert rules(body.replace("axis=-1", "axis=0"), shape="N,4,4") == {"across-batch"}


def test_images_that_a_copy_by_place_keeps_in_order_are_still_told_apart():
    copied = HONEST["as_strided"].replace(" y = ", " c = ")
    assert rules(f"{copied} m = ReduceMean<keepdims=1>(c, zero) y = Sub(c, m)") == {"across-batch"}


def test_an_index_of_any_length_is_not_computed():
    body = (
        "s = Shape(x) n = Gather(s, first) b = Mul(n, huge) r = Range(start, b, step)"
        " i = Mod(r, n) y = Gather<axis=0>(x, i)"
    )
    assert rules(body) == set()


def test_a_mean_of_windows_is_one_of_images():
    body = "w = Reshape(x, rows) m = ReduceMean<keepdims=1>(w, zero) y = Add(w, m)"
    assert rules(body, shape="N,4,4") == {"across-batch"}


@pytest.mark.parametrize("body", [
    "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)",
    "a = Abs(x) m = ReduceMax<keepdims=0>(a) s = Div(m, grain) k = Squeeze(s)"
    " q = QuantizeLinear(x, k, zp) y = DequantizeLinear(q, k, zp)",
])  # fmt: skip
def test_a_scale_of_the_whole_batch_is_named(body):
    assert rules(body) == {"dynamic-quantization"}


def test_a_range_that_goes_elsewhere_too_is_no_scale():
    body = (
        "m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, zp) d = DequantizeLinear(q, m, zp)"
        " y = Add(d, m)"
    )
    assert "across-batch" in rules(body)


def test_batch_statistics_are_across_the_batch():
    body = "y = BatchNormalization<training_mode=1>(x, bias, bias, bias, bias)"
    assert "across-batch" in rules(body)


@pytest.mark.parametrize("network", [ViT, ResNet18, MobileNetV2])
@pytest.mark.filterwarnings("ignore")
def test_networks_as_older_exporters_write_them_are_no_finding(network, tmp_path):
    """They compute the width of a head, and its root, from shapes."""
    net, names = network(num_classes=10).eval(), {"input_names": ["x"], "opset_version": 17}
    torch.onnx.export(
        net, (torch.zeros(2, 3, 32, 32),), tmp_path / "model.onnx", dynamo=False,
        dynamic_axes={"x": {0: "N"}}, **names,
    )  # fmt: skip
    assert list(batch_axis(onnx.load(tmp_path / "model.onnx"))) == []


@pytest.mark.parametrize(
    "network", [ViT, ResNet18, pytest.param(MobileNetV2, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_networks_as_torch_exports_them_are_no_finding(network, tmp_path):
    path = tmp_path / "model.onnx"
    net = network(num_classes=10).eval()
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        net, (torch.zeros(2, 3, 32, 32),), path, dynamo=True, dynamic_shapes=batch, verbose=False
    )
    assert list(batch_axis(onnx.load(path))) == []
    quantize_dynamic(path, tmp_path / "dynamic.onnx")
    found = {finding.rule for finding in batch_axis(onnx.load(tmp_path / "dynamic.onnx"))}
    assert found == {"dynamic-quantization"}
