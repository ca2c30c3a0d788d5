"""What was done to a float model is read off the quantized file, whoever made it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx.version_converter
import pytest
from onnxruntime.quantization import QuantFormat, QuantType, matmul_nbits_quantizer

from qdeploy.cli import main
from qdeploy.core.grids import Grid, quantize
from qdeploy.formats.onnx.reading import check, parse_proto
from qdeploy.graph.io import initializers, parse
from qdeploy.provenance.stored import with_constants
from qdeploy.provenance.trace import TIE, trace
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.methods import EfrapDescent, Nearest
from tests.nets import Net, float_model, residual_net
from tests.provenance_lab import (
    NETS,
    batchnorm_net,
    by_the_runtime,
    every_net,
    messages,
    quantized,
    source,
    x_of,
)


@every_net
@pytest.mark.parametrize("device", ["x86-vnni", "compact"])
def test_our_file_rounded_to_nearest_is_the_source_and_nothing_else(name, device, images):
    model = source(name)
    result, plan, _ = quantized(model, images, Nearest(), device)
    found = trace(result.onnx, model)
    assert found.not_compared is None
    assert not found.differences
    assert [layer.name for layer in found.layers] == [layer.site.name for layer in plan.layers]
    assert {(x.storage, x.bits) for x in found.layers} == {(plan.layers[0].storage.value, 4)}
    assert found.flipped == 0
    assert found.steps <= 0.5 + 1e-5
    assert found.nearest is None
    assert found.nearest_rounded
    assert found.cut_at_zero == ()


@every_net
def test_the_flips_and_digests_of_our_file_are_those_of_the_run(name, images):
    model = source(name)
    result, plan, grids = quantized(model, images, EfrapDescent())
    found = trace(result.onnx, model)
    assert not found.differences
    for layer, rounded, planned in zip(found.layers, result.layers, plan.layers, strict=True):
        grid = grids.weights[rounded.name]
        assert layer.name == rounded.name
        assert layer.codes_sha256 == rounded.sha256
        digest = hashlib.sha256(grid.scale.astype("<f4").tobytes())
        digest.update(grid.zero_point.astype("<i4").tobytes())
        assert layer.scales_sha256 == digest.hexdigest()
        weight = initializers(model.onnx)[planned.site.weight]
        assert layer.flipped == pytest.approx(rounded.flipped - tied(weight, rounded.codes, grid))
        assert layer.steps <= 1
    assert found.flipped > 0.05
    assert found.same_network
    assert not found.nearest_rounded


def tied(weight: np.ndarray, codes: np.ndarray, grid: Grid) -> float:
    """Share of codes that were flipped where the weight lies in the middle of two."""
    steps = weight / grid.scale.reshape(grid.along(weight.ndim))
    middle = np.abs(steps - np.floor(steps) - 0.5) <= TIE
    return float((middle & (codes != quantize(weight, grid))).mean())


def test_the_digests_are_those_in_the_report_of_a_run(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(residual_net())
    spread = "[0.25, 0.25, 0.25]"
    card = f"[input]\nshape = [3, 8, 8]\nmean = {spread}\nstd = {spread}\n"
    (tmp_path / "net.toml").write_text(card)
    command = "sanitize net.onnx --out q.onnx --report report.json --synthetic-calibration"
    with pytest.raises(SystemExit) as leaving:
        main(command.split())
    assert leaving.value.code == 4  # nothing to judge it by
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    found = trace((tmp_path / "q.unverified.onnx").read_bytes(), net)
    assert len(found.layers) == 6
    assert {x.name: x.codes_sha256 for x in found.layers} == {
        x["name"]: x["codes_sha256"] for x in report["layers"]
    }


@every_net
def test_the_nearest_form_of_our_file_holds_the_codes_of_the_nearest_one(name, images):
    model = source(name)
    chosen, plan, grids = quantized(model, images, EfrapDescent())
    nearest, _, _ = quantized(model, images, Nearest())
    found = trace(chosen.onnx, model)
    assert found.nearest is not None
    check(parse_proto(found.nearest, "nearest"), "nearest")
    constants, weights = initializers(found.nearest), initializers(model.onnx)
    want = initializers(nearest.onnx)
    for layer in plan.layers:
        codes = constants[f"{layer.site.weight}.quantized"].astype(np.int32)
        np.testing.assert_array_equal(codes, want[f"{layer.site.weight}.quantized"])
        exact = quantize(weights[layer.site.weight], grids.weights[layer.site.name])
        np.testing.assert_array_equal(codes, exact)
    again = trace(found.nearest, model)
    assert again.nearest_rounded
    assert again.flipped == 0
    assert again.nearest is None
    assert open_session(found.nearest).logits(x_of(model)).shape == (4, 10)
    others = [k for k in initializers(chosen.onnx) if not k.endswith("weight.quantized")]
    before = initializers(chosen.onnx)
    assert all(np.array_equal(before[k], constants[k]) for k in others)


def test_a_float_file_is_its_own_source():
    for name in NETS:
        found = trace(source(name).onnx, source(name))
        assert (found.layers, found.differences, found.not_compared) == ((), (), None)
        assert found.nearest is None


@every_net
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (QuantType.QInt8, QuantType.QUInt8),
        (QuantType.QUInt8, QuantType.QUInt8),
        (QuantType.QInt8, QuantType.QInt8),
    ],
    ids=["s8u8", "u8u8", "s8s8"],
)
def test_a_file_of_the_runtimes_quantizer_is_rounded_to_nearest(
    name, per_channel, weights, activations, tmp_path
):
    """From the graph as it came, and its Relus and Clips gone."""
    data = by_the_runtime(
        tmp_path, NETS[name](), per_channel=per_channel, weight_type=weights,
        activation_type=activations,
    )  # fmt: skip
    found = trace(data, source(name))
    assert found.not_compared is None
    assert messages(found) == ""
    planned = {layer.name for layer in found.layers}
    assert len(planned) == len(found.layers) >= 2
    assert found.flipped == 0
    assert found.steps <= 0.51
    assert found.nearest is None
    assert {layer.storage for layer in found.layers} == {str(weights)[1:].lower().lstrip("q")}
    assert max(layer.bias_shift for layer in found.layers) < 0.02


@pytest.mark.parametrize(
    "extra",
    [
        {"ActivationSymmetric": True},
        {"WeightSymmetric": False},
        {"AddQDQPairToWeight": True},
        {"DedicatedQDQPair": True},
        {"QuantizeBias": False},
    ],
    ids=lambda extra: next(iter(extra)),
)
@every_net
def test_other_settings_of_the_runtimes_quantizer_make_no_difference(name, extra, tmp_path):
    data = by_the_runtime(
        tmp_path, NETS[name](), extra_options=extra, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip
    found = trace(data, source(name))
    assert found.not_compared is None
    assert messages(found) == ""
    assert found.flipped == 0
    assert {x.rounded_at_load for x in found.layers} == {"AddQDQPairToWeight" in extra}


def test_a_batchnorm_may_be_folded_before_quantizing_or_stay_in_the_file(tmp_path):
    model = float_model(batchnorm_net())
    kept = by_the_runtime(
        tmp_path, batchnorm_net(), per_channel=True,
        op_types_to_quantize=["Conv", "Relu", "GlobalAveragePool", "Gemm"],
    )  # fmt: skip
    assert "BatchNormalization" in {node.op_type for node in parse(kept).graph}
    for data in (kept, by_the_runtime(tmp_path, model.onnx, per_channel=True)):
        found = trace(data, model)
        assert messages(found) == ""
        assert [layer.name for layer in found.layers] == ["conv0", "conv1", "fc"]
        assert found.flipped == 0
        assert found.steps <= 0.501


def test_flips_behind_a_batchnorm_that_stays_in_the_file_are_undone_on_its_grid(tmp_path):
    model = float_model(batchnorm_net())
    data = by_the_runtime(
        tmp_path, batchnorm_net(), op_types_to_quantize=["Conv"], weight_type=QuantType.QInt8
    )
    name = "conv1.weight_quantized"
    codes = initializers(data)[name].copy()
    codes.flat[::5] -= np.sign(codes.flat[::5])
    tampered = with_constants(data, {name: codes})
    assert tampered is not None
    found = trace(tampered, model)
    assert {x.name for x in found.layers if x.flipped} == {"conv1"}
    assert 0.15 < found.layers[1].flipped <= 0.2
    assert found.nearest is not None
    np.testing.assert_array_equal(initializers(found.nearest)[name], initializers(data)[name])


def test_true_four_bit_weights_of_another_maker(tmp_path):
    data = by_the_runtime(
        tmp_path, source("plain").onnx, weight_type=QuantType.QInt4, per_channel=True
    )
    found = trace(data, source("plain"))
    if found.not_compared is None:
        assert found.flipped == 0
        assert {layer.storage for layer in found.layers} == {"int4"}
    else:
        assert "com.microsoft" in found.not_compared


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_four_bits_whose_scales_take_a_sign(symmetric):
    """The value of largest magnitude gets the lowest code, so half of the scales are negative."""
    proto = onnx.version_converter.convert_version(parse_proto(source("matmul").onnx, ""), 21)
    proto.ir_version = 10
    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=16, is_symmetric=symmetric, quant_format=QuantFormat.QDQ
    )
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(proto, algo_config=config)
    quantizer.process()
    data = quantizer.model.model.SerializeToString()
    scales = [v for k, v in initializers(data).items() if k.endswith("scales")]
    assert any((scale < 0).any() for scale in scales) is symmetric
    found = trace(data, source("matmul"))
    assert found.not_compared is None
    assert (found.differences, found.steps <= 1, found.flipped) == ((), True, 0)


def add_to_bias(data: bytes, name: str, much: float) -> bytes:
    values = initializers(data)[name].copy()
    values.flat[0] += much
    changed = with_constants(data, {name: values})
    assert changed is not None
    return changed


@pytest.mark.parametrize(("much", "seen"), [(0.0, False), (1e-7, False), (0.1, True), (-50, True)])
def test_a_bias_of_a_layer_left_in_floats_is_compared(tmp_path, much, seen):
    model = source("plain")
    data = by_the_runtime(tmp_path, model.onnx, op_types_to_quantize=["Conv"])
    found = trace(add_to_bias(data, "fc.bias", much), model)
    assert ("the bias of 'fc'" in messages(found)) is seen
    assert found.same_network is not seen


@pytest.mark.parametrize(("steps", "seen"), [(1, False), (1 << 20, True)])
def test_a_bias_that_no_correction_explains_is_a_difference(tmp_path, steps, seen):
    model = source("plain")
    data = by_the_runtime(tmp_path, model.onnx)
    found = trace(add_to_bias(data, "fc.bias_quantized", steps), model)
    assert ("a bias of 'fc' is moved" in messages(found)) is seen


def lone_norm_net() -> bytes:
    """A BatchNorm behind a Relu, which nothing can be folded into; its factors differ widely."""
    net = Net(seed=6)
    x = net.relu(net.conv(net.x, 8, 3, 3, 3, name="conv", pads=[1, 1, 1, 1]))
    factors = [net.weight(8, name=f"bn.{part}") for part in ("weight", "shift", "mean")]
    variance = net.constant(net.rng.uniform(0.5, 2, 8).astype(np.float32))
    x = net.node("BatchNormalization", x, *factors, variance)
    return net.model(net.head(net.relu(x), 8))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_batchnorm_may_be_rounded_on_grids_of_its_own(tmp_path, per_channel):
    data = by_the_runtime(tmp_path, lone_norm_net(), per_channel=per_channel)
    assert "BatchNormalization" in {node.op_type for node in parse(data).graph}
    found = trace(data, float_model(lone_norm_net()))
    assert messages(found) == ""
    assert (found.not_compared, found.same_network, found.flipped) == (None, True, 0)


@pytest.mark.parametrize("part", ["weight", "shift"])
def test_a_batchnorm_that_was_moved_by_more_than_rounding_is_a_difference(tmp_path, part):
    data = by_the_runtime(tmp_path, lone_norm_net())
    name = next(n for n in initializers(data) if n.startswith(f"bn.{part}") and "quantized" in n)
    codes = initializers(data)[name].astype(np.int64)
    far = 3 if codes.itemsize == 1 or part == "weight" else 1 << 24
    codes.flat[0] -= far * np.sign(codes.flat[0])
    tampered = with_constants(data, {name: codes})
    assert tampered is not None
    assert "bn" in messages(trace(tampered, float_model(lone_norm_net())))


def test_a_batchnorm_that_imitates_another_layers_weight_gives_it_no_room(tmp_path):
    """Its factors are the numbers of a convolution that has fewer channels than numbers."""
    net = Net(seed=7)
    x = net.relu(net.conv(net.x, 8, 3, 3, 3, name="conv", pads=[1, 1, 1, 1]))
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    x = net.node("BatchNormalization", x, *(net.constant(v) for v in (ones, zeros, zeros, ones)))
    small = net.constant(np.full((2, 4, 1, 1), 1 / np.sqrt(np.float32(1 + 1e-5)), np.float32))
    x = net.node("Conv", net.relu(x), small, net.weight(2), group=2)
    data = net.model(net.head(x, 2))
    file = by_the_runtime(tmp_path, data, op_types_to_quantize=["BatchNormalization"])
    assert trace(file, float_model(data)).same_network
