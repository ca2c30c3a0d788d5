"""What a processor without VNNI computes: pairs of 8-bit products that saturate, told bit by bit.

Such a processor multiplies with `vpmaddubsw`: products of neighbours along the inner axis are added
in 16 bits, and the sum saturates. The emulation says on any machine what comes out there; on a
processor of that kind it is held against onnxruntime itself.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - bare products, no model

from qdeploy.formats.onnx.codes import products_fit
from qdeploy.machine import exact_8bit_products, processor_flags
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import LARGEST_CODE_WITHOUT_SATURATION, load_device
from qdeploy.settings.methods import Nearest
from tests.nets import Net
from tests.test_quantized_file import quantized

SATURATES = not exact_8bit_products(processor_flags())
INNER = (8, 9, 27, 31, 64)  # lengths of the inner axis; a lone last value is paired with nothing
CONVOLUTIONS = ((8, 3), (3, 3), (16, 1), (5, 3))  # input channels, kernel


def exact(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(M,K) of 0..255 by (K,N) of -128..127, in 32 bits."""
    return codes.astype(np.int32) @ weights.astype(np.int32)


def saturating(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same, but neighbours along K are added in 16 bits that saturate."""
    odd = codes.shape[1] % 2
    a = np.pad(codes.astype(np.int32), ((0, 0), (0, odd)))
    b = np.pad(weights.astype(np.int32), ((0, odd), (0, 0)))
    pairs = a[:, 0::2, None] * b[None, 0::2] + a[:, 1::2, None] * b[None, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


def drawn(*shape: int, dtype: type, largest: int = 128) -> np.ndarray:
    low, high = (0, 256) if dtype is np.uint8 else (-largest, min(largest + 1, 128))
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(dtype)


def run(node: onnx.NodeProto, given: np.ndarray, constants: dict, out: int, *, may_saturate: bool):
    value = helper.make_tensor_value_info
    kinds = {np.dtype(np.uint8): TensorProto.UINT8}
    inputs = [value("x", kinds[given.dtype], list(given.shape))]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph([node], "products", inputs, [value("y", out, None)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = open_session(model.SerializeToString(), saturating=may_saturate)
    return session.run(given)["y"]


def product(codes: np.ndarray, weights: np.ndarray, *, may_saturate: bool) -> np.ndarray:
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    return run(node, codes, {"w": weights}, TensorProto.INT32, may_saturate=may_saturate)


def convolution(image: np.ndarray, weights: np.ndarray, *, may_saturate: bool) -> np.ndarray:
    names = ("xs", "xz", "w", "ws", "wz", "ys", "yz")
    one, zero = np.float32(1), np.uint8(0)
    arrays = (one, zero, weights, one, np.int8(0), np.float32(4096), np.uint8(128))
    constants = dict(zip(names, arrays, strict=True))
    node = helper.make_node("QLinearConv", ["x", *names], ["y"])
    return run(node, image, constants, TensorProto.UINT8, may_saturate=may_saturate)


def convolved(image: np.ndarray, weights: np.ndarray, multiply) -> np.ndarray:
    """(1,C,H,W) by (O,C,k,k) as a product of patches whose channels are innermost."""
    many, _, kernel, _ = weights.shape
    side = image.shape[2] - kernel + 1
    places = [(i, j) for i in range(side) for j in range(side)]
    windows = [image[0, :, i : i + kernel, j : j + kernel] for i, j in places]
    patches = np.stack([window.transpose(1, 2, 0).ravel() for window in windows])
    sums = multiply(patches, weights.transpose(0, 2, 3, 1).reshape(many, -1).T)
    codes = np.clip(np.rint(sums.astype(np.float32) / 4096) + 128, 0, 255).astype(np.uint8)
    return codes.T.reshape(1, many, side, side)


@pytest.mark.parametrize("inner", INNER)
def test_products_of_matrices(inner):
    codes, weights = drawn(5, inner, dtype=np.uint8), drawn(inner, 16, dtype=np.int8)
    here = saturating if SATURATES else exact
    assert (saturating(codes, weights) != exact(codes, weights)).any()
    np.testing.assert_array_equal(product(codes, weights, may_saturate=True), here(codes, weights))
    np.testing.assert_array_equal(
        product(codes, weights, may_saturate=False), exact(codes, weights)
    )


@pytest.mark.parametrize(("channels", "kernel"), CONVOLUTIONS)
def test_convolutions(channels, kernel):
    image = drawn(1, channels, 6, 6, dtype=np.uint8)
    weights = drawn(8, channels, kernel, kernel, dtype=np.int8)
    here = saturating if SATURATES else exact
    assert (convolved(image, weights, saturating) != convolved(image, weights, exact)).any()
    np.testing.assert_array_equal(
        convolution(image, weights, may_saturate=True), convolved(image, weights, here)
    )
    np.testing.assert_array_equal(
        convolution(image, weights, may_saturate=False), convolved(image, weights, exact)
    )


@pytest.mark.parametrize("inner", INNER)
def test_codes_of_the_avx2_profile_never_saturate(inner):
    largest = LARGEST_CODE_WITHOUT_SATURATION
    codes = np.full((5, inner), 255, np.uint8)
    for weights in (
        np.full((inner, 16), largest, np.int8),
        np.full((inner, 16), -largest, np.int8),
        drawn(inner, 16, dtype=np.int8, largest=largest),
    ):
        np.testing.assert_array_equal(saturating(codes, weights), exact(codes, weights))
        np.testing.assert_array_equal(
            product(codes, weights, may_saturate=True), exact(codes, weights)
        )
    one_more = np.full((inner, 16), largest + 1, np.int8)
    assert (saturating(codes, one_more) != exact(codes, one_more)).any()


@pytest.mark.parametrize(("most", "fits"), [(64, True), (-64, True), (65, False), (-128, False)])
def test_files_whose_products_fit_are_known(most, fits):
    codes = np.zeros((4, 8), np.int8)
    codes[1, 2] = most
    net = Net()
    net.constant(codes, "weight")
    data = net.model(net.head(net.x, 3))
    assert products_fit(data, LARGEST_CODE_WITHOUT_SATURATION) is fits


def unknown_codes(net: Net, how: str) -> None:
    """Signed codes of which the file's constants do not tell how large they are."""
    scale, signed = net.constant(np.float32(0.1)), net.constant(np.int8(0))
    floats, small = net.weight(4, 8), net.constant(np.full((4, 8), 60, np.int8))
    match how:
        case "rounded at load":
            codes = net.node("QuantizeLinear", floats, scale, signed)
        case "cast":
            codes = net.node("Cast", floats, to=onnx.TensorProto.INT8)
        case "added":
            codes = net.node("Add", small, small)
        case "multiplied":
            net.node("MatMulInteger", net.constant(np.ones((2, 4), np.uint8)), small)
            return
        case _:
            raise AssertionError(how)
    net.node("DequantizeLinear", codes, scale, signed)


@pytest.mark.parametrize("how", ["rounded at load", "cast", "added", "multiplied"])
def test_codes_that_no_constant_shows_are_not_known_to_fit(how):
    net = Net()
    unknown_codes(net, how)
    assert not products_fit(net.model(net.head(net.x, 3)), LARGEST_CODE_WITHOUT_SATURATION)


@pytest.mark.parametrize(
    ("bits", "device", "fits"),
    [(4, "x86-vnni", True), (8, "x86-avx2", True), (8, "x86-vnni", False)],
)
def test_of_our_own_files_it_is_known(net, images, bits, device, fits):
    file, _, _ = quantized(net, images, bits=bits, device=device, rounding=Nearest())
    assert products_fit(file.onnx, LARGEST_CODE_WITHOUT_SATURATION) is fits


@pytest.mark.parametrize(("name", "saturates"), [
    ("x86-vnni", False), ("compact", False), ("cuda", False), ("x86-avx2", True),
])  # fmt: skip
def test_profiles_say_whether_their_processor_saturates(name, saturates):
    assert load_device(name).saturates is saturates
