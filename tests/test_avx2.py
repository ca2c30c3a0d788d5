"""What x86 without VNNI answers, told on any machine: counted, and emulated."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import torch

import qdeploy.judging.measure as judging
from qdeploy.core.saturation import less_lost
from qdeploy.detectors.saturating import pairs_of, saturating_pairs
from qdeploy.formats.onnx.saturation import lost, products, saturable, with_losses
from qdeploy.formats.onnx.standard import in_standard_operators
from qdeploy.graph.differentiable import as_function
from qdeploy.graph.io import serialize
from qdeploy.inputs.sources import Given, resolve
from qdeploy.machine import exact_8bit_products, processor_flags
from qdeploy.runtime.avx2 import Avx2
from qdeploy.runtime.known import RUNTIMES
from qdeploy.runtime.reference import Reference
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import RuntimeSpec
from qdeploy.settings.methods import Nearest
from tests.gate_lab import copied, run
from tests.test_quantized_file import quantized
from tests.test_saturation import saturating

SATURATES = not exact_8bit_products(processor_flags())
EMULATED, EXACT = RuntimeSpec(provider="avx2-emulated"), RuntimeSpec(provider="reference")
GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N,{channels},6,6] x) => (float[N,{rows},{side},{side}] y)
<float xs = {{0.02}}, uint8 xz = {{{zero}}}, float[{rows}] ws = {{{scales}}},
 int8[{rows}] wz = {{{zeros}}}, float ys = {{0.5}}, uint8 yz = {{128}},
 int8[{rows},{inner},{kernel},{kernel}] w> {{
    q = QuantizeLinear(x, xs, xz)
    d = DequantizeLinear(q, xs, xz)
    k = DequantizeLinear<axis=0>(w, ws, wz)
    c = Conv<kernel_shape=[{kernel},{kernel}], strides=[{stride},{stride}],
             pads=[{pad},{pad},{pad},{pad}], dilations=[{dilation},{dilation}], group={group}>(d, k)
    r = QuantizeLinear(c, ys, yz)
    y = DequantizeLinear(r, ys, yz)
}}
"""
PLAIN = {"channels": 8, "rows": 4, "kernel": 3, "pad": 1}
SHAPES = [
    {"channels": 3, "rows": 8, "kernel": 3, "pad": 1},
    {"channels": 8, "rows": 4, "kernel": 3, "pad": 0},
    {"channels": 8, "rows": 4, "kernel": 1, "pad": 0},
    {"channels": 5, "rows": 3, "kernel": 3, "pad": 1, "stride": 2},
    {"channels": 8, "rows": 4, "kernel": 3, "pad": 2, "dilation": 2},
    {"channels": 8, "rows": 4, "kernel": 3, "pad": 1, "group": 2},
]


def side_of(shape: dict[str, int]) -> int:
    reach = shape.get("dilation", 1) * (shape["kernel"] - 1) + 1
    return (6 + 2 * shape["pad"] - reach) // shape.get("stride", 1) + 1


def convolution(shape: dict[str, int]) -> tuple[bytes, np.ndarray]:
    """A file of one convolution with large integers, and they."""
    given = {"stride": 1, "dilation": 1, "group": 1, **shape}
    rows, inner = given["rows"], given["channels"] // given["group"]
    text = GRAPH.format(
        **given, zero=110, side=side_of(given), inner=inner, zeros=", ".join("0" * rows),
        scales=", ".join(f"0.0{i + 1}" for i in range(rows)),
    )  # fmt: skip
    proto = onnx.parser.parse_model(text)
    size = (rows, inner, given["kernel"], given["kernel"])
    codes = np.random.default_rng(rows).integers(-128, 128, size).astype(np.int8)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(codes, "w"))
    return proto.SerializeToString(), codes


def images(channels: int) -> np.ndarray:
    drawn = np.random.default_rng(7).normal(size=(2, channels, 6, 6))
    return (2 * drawn).astype(np.float32)


def by_hand(
    x: np.ndarray, weights: np.ndarray, shape: dict[str, int], zero: int = 110
) -> np.ndarray:
    """Patch by patch, with the sums of `tests.test_saturation`."""
    pad, stride, dilation, group = (
        shape.get(name, default)
        for name, default in (("pad", 0), ("stride", 1), ("dilation", 1), ("group", 1))
    )
    kernel, rows, inner = shape["kernel"], shape["rows"], weights.shape[1]
    codes = np.clip(np.rint(x / np.float32(0.02)) + zero, 0, 255).astype(np.uint8)
    codes = np.pad(codes, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=zero)
    side = side_of(shape)
    found = np.zeros((len(x), rows, side, side))
    for row in range(rows):
        first = row // (rows // group) * inner
        weight = weights[row].transpose(1, 2, 0).reshape(-1, 1)
        for i in range(side):
            for j in range(side):
                reach = [s * stride + dilation * np.arange(kernel) for s in (i, j)]
                patch = codes[:, first : first + inner][:, :, reach[0]][:, :, :, reach[1]]
                flat = patch.transpose(0, 2, 3, 1).reshape(len(x), -1)
                sums = saturating(flat, weight)[:, 0] - zero * int(weight.astype(int).sum())
                found[:, row, i, j] = sums * 0.02 * float(f"0.0{row + 1}")
    return (np.clip(np.rint(found / 0.5), -128, 127) * 0.5).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emulation_is_what_pairs_of_products_give(shape):
    file, weights = convolution(shape)
    x = images(shape["channels"])
    emulated = Avx2().open(file, EMULATED).logits(x)
    exact = Reference().open(file, EXACT).logits(x)
    assert (np.abs(emulated - exact) > 1).any()  # something saturates
    off = np.abs(emulated - by_hand(x, weights, shape))
    assert off.max() <= 0.5  # one code, where a sum lies between two
    assert (off > 0).mean() < 0.01


def test_names_of_the_file_do_not_get_in_the_way():
    file, _ = convolution(PLAIN)
    proto = onnx.load_from_string(file)
    for node in proto.graph.node:  # what would be added is there already, and read at the end
        for names in (node.input, node.output):
            names[:] = [{"d": "c.exact"}.get(name, name) for name in names]
    x = images(PLAIN["channels"])
    want = Avx2().open(file, EMULATED).logits(x)
    got = Avx2().open(proto.SerializeToString(), EMULATED).logits(x)
    np.testing.assert_array_equal(got, want)
    added, _ = with_losses(proto.SerializeToString(), "it")
    made = [name for node in added.graph.node for name in node.output]
    assert len(made) == len(set(made))


@pytest.mark.skipif(not SATURATES, reason="this processor adds products exactly")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emulation_is_what_this_processor_gives(shape):
    file, _ = convolution(shape)
    x = images(shape["channels"])
    real = next(iter(open_session(file, saturating=True).run(x).values()))
    off = np.abs(Avx2().open(file, EMULATED).logits(x) - real)
    assert off.max() <= 0.5
    assert (off > 0).mean() < 0.01


def test_depthwise_convolutions_do_not_saturate():
    file, _ = convolution({"channels": 8, "rows": 8, "kernel": 3, "pad": 1, "group": 8})
    assert saturable(file, "it").of == 0


def test_a_convolution_whose_result_stays_float_is_not_one_of_integers():
    file, _ = convolution(PLAIN)
    proto = onnx.load_from_string(file)
    del proto.graph.node[-2:]
    proto.graph.node[-1].output[0] = "y"
    assert saturable(proto.SerializeToString(), "it").of == 0


@pytest.mark.parametrize(("largest", "some"), [(64, False), (65, True)])
def test_pairs_that_can_saturate_are_counted(largest, some):
    file, _ = convolution(PLAIN)
    proto = onnx.load_from_string(file)
    codes = np.zeros((4, 8, 3, 3), np.int8)
    codes[2, :2, 1, 1] = largest  # neighbours along the channels
    codes[3, :2, 1, 1] = (largest, -largest)  # which cancel
    codes[1, 1:3, 0, 0] = largest  # of two pairs
    proto.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(codes, "w"))
    found = saturable(proto.SerializeToString(), "it")
    assert (found.pairs, found.channels) == ((1, 1) if some else (0, 0))
    assert (found.of, found.of_channels) == (4 * 36, 4)
    assert found.text == (
        "0.7 % of 144 pairs of products, in 1 of 4 channels of 1 layers" if some
        else "none of 144 pairs of products"
    )  # fmt: skip


def test_sums_of_a_matrix_product_lose_what_saturates(net, images):
    file, _, _ = quantized(net, images, bits=8, rounding=Nearest())
    matrices = [one for one in products(onnx.load_from_string(file.onnx)) if one.window is None]
    assert matrices
    codes = np.full((3, matrices[0].weights.shape[1]), 255, np.uint8)
    want = saturating(codes, matrices[0].weights.T)
    exact = codes.astype(np.int32) @ matrices[0].weights.T.astype(np.int32)
    np.testing.assert_allclose(
        lost(matrices[0], codes), (exact - want) * matrices[0].scale, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("bits", "device"), [(4, "x86-vnni"), (8, "x86-avx2")])
def test_files_made_for_it_answer_there_as_everywhere(net, images, bits, device):
    file, _, _ = quantized(net, images, bits=bits, device=device, rounding=Nearest())
    x = images.preprocessing.normalise(next(images.batches(16)).pixels)
    emulated, exact = (
        RUNTIMES[spec.provider].open(file.onnx, spec).logits(x) for spec in (EMULATED, EXACT)
    )
    np.testing.assert_array_equal(emulated, exact)
    assert saturable(file.onnx, "it").pairs == 0


@pytest.fixture
def lab(lab_files, tmp_path):
    with copied(lab_files, tmp_path) as lab:
        yield lab


def gated(lab, *more: str) -> tuple[int, dict]:
    code = run("gate", "ort-full.onnx", "--reference", "fp32.onnx", "--report", "r.json", *more)
    return code, json.loads((lab / "r.json").read_text("utf-8"))


@pytest.fixture
def full(lab):
    """The good file with all integers turned up as far as they go, on scales as much smaller."""

    def stretch(proto: onnx.ModelProto) -> None:
        held = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            tensor = held.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if tensor is None or tensor.data_type != onnx.TensorProto.INT8:
                continue
            codes, scale = (onnx.numpy_helper.to_array(held[name]) for name in node.input[:2])
            if codes.ndim < 2 or np.abs(codes).max() > 63:
                continue
            by = 127 // np.abs(codes.astype(int)).max()
            held[node.input[0]].CopyFrom(
                onnx.numpy_helper.from_array((codes * by).astype(np.int8), node.input[0])
            )
            smaller = onnx.numpy_helper.from_array((scale / by).astype(np.float32), node.input[1])
            held[node.input[1]].CopyFrom(smaller)

    return lab.changed("good.onnx", "ort-full.onnx", stretch)


VNNI = """
schema_version = 1
name = "vnni"
description = "x"
[[runtimes]]
provider = "cpu"
"""


@pytest.mark.usefixtures("full")
def test_the_gate_notes_that_another_processor_may_answer_otherwise(lab):
    (lab / "vnni.toml").write_text(VNNI)
    _, report = gated(lab, "--policy", "demo", "--device", "vnni.toml")
    assert any("x86 without VNNI may saturate" in note for note in report["notes"])
    asked = VNNI + '[[runtimes]]\nprovider = "avx2-emulated"\n'
    (lab / "vnni.toml").write_text(asked)
    _, report = gated(lab, "--policy", "demo", "--device", "vnni.toml")
    assert not any("x86 without VNNI" in note for note in report["notes"])
    (row,) = report["runtime_agreement"]
    assert row["runtime"] == "avx2-emulated"
    assert {m["runtime"] for m in report["measurements"]} == {"cpu", "avx2-emulated"}


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("vnni", [True, False])
def test_a_device_that_saturates_is_emulated_where_this_processor_does_not(lab, monkeypatch, vnni):
    flags = frozenset({"avx2", "avx512_vnni"} if vnni else {"avx2"})
    monkeypatch.setattr(judging, "processor_flags", lambda: flags)
    _, report = gated(lab, "--policy", "demo")
    asked = {row["runtime"] for row in report["runtime_agreement"]}
    assert ("avx2-emulated" in asked) is vnni
    assert run("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo",
               "--report", "r.json") == 0  # fmt: skip
    report = json.loads((lab / "r.json").read_text("utf-8"))
    asked = {row["runtime"] for row in report["runtime_agreement"]}
    assert "avx2-emulated" not in asked  # none of its pairs can


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(("most", "off"), [(0.0, True), (100.0, False)])
def test_a_policy_may_demand_that_nothing_saturates(lab, most, off):
    (lab / "vnni.toml").write_text(VNNI)
    (lab / "exact.toml").write_text(
        'schema_version = 1\nname = "exact"\ndescription = "x"\n[gate]\n'
        f'required = ["saturable_pairs"]\nmax_saturable_pairs = {most}\n'
    )
    _, report = gated(lab, "--policy", "exact.toml", "--device", "vnni.toml")
    assert any("saturable_pairs" in reason for reason in report["reasons"]) is off


@pytest.mark.usefixtures("full")
def test_info_tells_how_much_of_a_file_can_saturate(lab, capsys):
    assert run("info", "ort-full.onnx") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "x86 without VNNI saturates" in said
    assert " % of " in said
    assert run("info", "good.onnx") == 0
    assert "none of " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_torch_a_convolution_loses_the_same_with_gradients(shape):
    file, _ = convolution(shape)
    (product,) = products(onnx.load_from_string(file))
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (2, shape["channels"], 6, 6)).astype(np.uint8)
    want = lost(product, codes)
    assert (want != 0).any()
    pairs = pairs_of(product)
    x = torch.from_numpy((codes.astype(np.float64) - product.zero_point) * product.step)
    pairs = replace(pairs, weights=pairs.weights.double(), scale=pairs.scale.double())
    exact = torch.zeros(want.shape, dtype=torch.float64)
    np.testing.assert_allclose(less_lost(exact, x, pairs), -want, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(lambda x: less_lost(exact, x, pairs), x.requires_grad_())


def test_in_torch_a_matrix_product_loses_the_same(net, images):
    file, _, _ = quantized(net, images, bits=8, rounding=Nearest())
    product = next(p for p in products(onnx.load_from_string(file.onnx)) if p.window is None)
    weights = np.random.default_rng(0).integers(-128, 128, product.weights.shape).astype(np.int8)
    product = replace(product, weights=weights)
    codes = np.random.default_rng(1).integers(0, 256, (5, weights.shape[1])).astype(np.uint8)
    x = torch.from_numpy((codes.astype(np.float32) - product.zero_point) * product.step)
    want = lost(product, codes)
    got = less_lost(torch.zeros(want.shape), x, pairs_of(product))
    np.testing.assert_allclose(got, -want, rtol=1e-3, atol=1e-4)
    assert (want != 0).any()


def test_a_file_as_a_function_saturates_as_the_emulation_does(full, lab):
    file = full.read_bytes()
    source = resolve(lab / "fp32.onnx", Given()).preprocessing
    pixels = lab.images("test")[0][:64].reshape(-1, 1, 8, 8).astype(np.float32) / 255
    want = Avx2().open(file, EMULATED).logits(source.normalise(pixels))
    standard = serialize(in_standard_operators(file, "it"))
    off = []
    for which in ({}, saturating_pairs(standard)):
        run_ = as_function(standard, source, torch.device("cpu"), which)
        with torch.no_grad():
            off.append(np.abs(run_(torch.from_numpy(pixels)).numpy() - want).max())
    assert off[1] < 0.1 * off[0]  # which is what the activations lose that are not rounded
