"""Classifiers with the ends that other tools give them, and what must come of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qdeploy.errors import InputError, UsageError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.reading import parse_proto
from qdeploy.graph.ends import as_classifier
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.card import ModelCard
from qdeploy.values import NOTHING_STATED, FloatModel, Loaded, Origin, Stated
from tests.gate_lab import run
from tests.nets import Net, residual_net

SHAPE = (3, 8, 8)
IMAGES = Stated(SHAPE)
PIXELS = Stated(SHAPE, pixel_range=(0.0, 255.0))
FLOAT, HALF, BYTES = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8
Rows = np.ndarray


def net_with(*shape: int | str, dtype: ir.DataType = FLOAT) -> Net:
    """A network whose input has the shape, with the batch before it."""
    net = Net()
    net.x = ir.val("image", dtype=dtype, shape=["N", *shape])
    return net


def body(net: Net, x: ir.Value, classes: int = 10) -> ir.Value:
    a = net.relu(net.conv(x, 8, 3, 3, 3, name="stem", pads=[1, 1, 1, 1]))
    return net.head(net.relu(net.conv(a, 8, 8, 3, 3, name="block", pads=[1, 1, 1, 1])), 8, classes)


def written(net: Net, output: ir.Value, *shape: int | str, dtype: ir.DataType = FLOAT) -> bytes:
    output.name, output.shape, output.dtype = "scores", ir.Shape(list(shape)), dtype
    graph = ir.Graph(
        [net.x], [output], nodes=net.nodes, initializers=net.constants, opset_imports={"": 17},
        name="net",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()


def channels_last() -> bytes:
    net = net_with(8, 8, 3)
    x = net.node("Transpose", net.x, perm=[0, 3, 1, 2])
    return written(net, body(net, x), "N", 10)


def open_size() -> bytes:
    net = net_with("channels", "height", "width")
    return written(net, body(net, net.x), "N", 10)


def flat() -> bytes:
    net = net_with(192)
    hidden = net.relu(net.node("Gemm", net.x, net.weight(16, 192), net.weight(16), transB=1))
    return written(net, net.node("Gemm", hidden, net.weight(10, 16), transB=1), "N", 10)


def takes_bytes() -> bytes:
    net = net_with(*SHAPE, dtype=BYTES)
    x = net.node("Cast", net.x, to=FLOAT)
    x = net.node("Div", x, net.constant(np.array(127.5, np.float32)))
    return written(net, body(net, x), "N", 10)


def narrow() -> bytes:
    net = net_with(*SHAPE, dtype=HALF)
    output = body(net, net.x)
    for constant in net.constants:
        values = constant.const_value.numpy().astype(np.float16)
        constant.const_value, constant.dtype = ir.tensor(values, name=constant.name), HALF
    return written(net, output, "N", 10, dtype=HALF)


def narrow_weights() -> bytes:
    net = net_with(*SHAPE)
    weight = net.constant(net.rng.normal(size=(8, 3, 3, 3)).astype(np.float16), "w")
    a = net.relu(net.node("Conv", net.x, net.node("Cast", weight, to=FLOAT), pads=[1, 1, 1, 1]))
    return written(net, net.head(a, 8), "N", 10)


def spatial() -> bytes:
    net = net_with(*SHAPE)
    a = net.relu(net.conv(net.x, 8, 3, 3, 3, name="stem", pads=[1, 1, 1, 1]))
    pooled = net.node("GlobalAveragePool", net.conv(a, 10, 8, 1, 1, name="last"))
    return written(net, pooled, "N", 10, 1, 1)


def spatial_of_open_size() -> bytes:
    """Nothing says that the last dimensions are 1 before the input's are known."""
    net = net_with(3, "h", "w")
    a = net.relu(net.conv(net.x, 10, 3, 8, 8, name="stem"))
    return written(net, a, "N", 10, "h2", "w2")


def one_logit() -> bytes:
    net = net_with(*SHAPE)
    return written(net, body(net, net.x, classes=1), "N", 1)


def one_probability() -> bytes:
    net = net_with(*SHAPE)
    sigmoid = net.node("Sigmoid", body(net, net.x, classes=1))
    return written(net, net.node("Squeeze", sigmoid, net.constant(np.array([1]))), "N")


def functions() -> bytes:
    """A function of the model's own, as older exporters of torch write modules."""
    net = net_with(*SHAPE)
    output = body(net, net.x)
    proto = onnx.ModelProto.FromString(written(net, output, "N", 10))
    text = '<opset_import: ["": 17], domain: "pkg"> Act (i) => (o) { o = Relu (i) }'
    proto.functions.append(onnx.parser.parse_function(text))
    proto.opset_import.add(domain="pkg", version=1)
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Act", "pkg"
    return proto.SerializeToString()


def fixed_batch(data: bytes, output: tuple[int, ...] = (1, 10)) -> bytes:
    """The same with a batch of one and no other written into it."""
    proto = onnx.ModelProto.FromString(data)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    for dim, size in zip(proto.graph.output[0].type.tensor_type.shape.dim, output, strict=True):
        dim.dim_value = size
    return proto.SerializeToString()


def class_token() -> bytes:
    net = net_with(*SHAPE)
    patches = net.conv(net.x, 8, 3, 4, 4, name="patches", strides=[4, 4])
    rows = net.node("Reshape", patches, net.constant(np.array([1, 8, 4])))
    tokens = net.node("Transpose", rows, perm=[0, 2, 1])
    all_tokens = net.node("Concat", net.weight(1, 1, 8), tokens, axis=1)
    mixed = net.relu(net.node("MatMul", all_tokens, net.weight(8, 8)))
    token = net.node("Gather", mixed, net.constant(np.array(0)), axis=1)
    return fixed_batch(written(net, net.node("Gemm", token, net.weight(10, 8), transB=1), 1, 10))


def windows() -> bytes:
    net = net_with(*SHAPE)
    a = net.conv(net.x, 8, 3, 3, 3, name="stem", pads=[1, 1, 1, 1])
    split = net.node("Reshape", a, net.constant(np.array([1, 8, 2, 4, 2, 4])))
    moved = net.node("Transpose", split, perm=[0, 2, 4, 3, 5, 1])
    shape = ir.node("Constant", [], {"value": ir.tensor(np.array([4, 16, 8]))})
    shape.outputs[0].name = "shape"
    net.nodes.append(shape)
    folded = net.node("Reshape", moved, shape.outputs[0])
    mixed = net.relu(net.node("MatMul", folded, net.weight(8, 8)))
    back = net.node("Reshape", mixed, net.constant(np.array([1, 64, 8])))
    mean = net.node("ReduceMean", back, axes=[1], keepdims=0)
    return fixed_batch(written(net, net.node("Gemm", mean, net.weight(10, 8), transB=1), 1, 10))


@dataclass(frozen=True)
class Foreign:
    """A file, what must be stated of it, how it is fed, and how its answers read as classes."""

    make: Callable[[], bytes]
    stated: Stated = NOTHING_STATED
    feed: Callable[[Rows], Rows] = lambda x: x
    read: Callable[[Rows], Rows] = lambda y: y
    tolerance: float = 1e-4


FILES = {
    "channels last": Foreign(channels_last, IMAGES, lambda x: x.transpose(0, 2, 3, 1)),
    "channels last, recognised": Foreign(channels_last, feed=lambda x: x.transpose(0, 2, 3, 1)),
    "open size": Foreign(open_size, IMAGES),
    "flat": Foreign(flat, IMAGES, lambda x: x.reshape(len(x), -1)),
    "bytes": Foreign(takes_bytes, PIXELS, lambda x: x.astype(np.uint8)),
    "16 bits": Foreign(narrow, feed=lambda x: x.astype(np.float16), tolerance=2e-2),
    "weights of 16 bits": Foreign(narrow_weights),
    "spatial": Foreign(spatial, read=lambda y: y[:, :, 0, 0]),
    "spatial of open size": Foreign(spatial_of_open_size, IMAGES, read=lambda y: y[:, :, 0, 0]),
    "one logit": Foreign(one_logit, read=lambda y: np.concatenate([0 * y, y], 1)),
    "one probability": Foreign(one_probability, read=lambda y: np.stack([1 - y, y], 1)),
    "functions": Foreign(functions),
    "class token": Foreign(class_token),
    "windows": Foreign(windows),
}


def answers(case: Foreign, data: bytes, x: Rows) -> Rows:
    """What onnxruntime says to the file as it is, image by image."""
    session = ort.InferenceSession(data)
    (name,) = (value.name for value in session.get_inputs())
    parts = [session.run(None, {name: case.feed(x[i : i + 1])})[0] for i in range(len(x))]
    return case.read(np.concatenate(parts).astype(np.float32))


def exported(data: bytes, stated: Stated) -> FloatModel:
    origin = Origin("foreign.onnx", "0" * 64, "ONNX")
    return export(Loaded(origin, parse_proto(data, "foreign.onnx"), "onnx"), stated=stated)


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_becomes_the_same_classifier_of_images(name, rng):
    case = FILES[name]
    data = case.make()
    model = exported(data, case.stated)
    assert model.input_shape == SHAPE
    x = rng.normal(size=(5, *SHAPE)).astype(np.float32)
    x = np.floor(rng.uniform(0, 256, x.shape)).astype(np.float32) if name == "bytes" else x
    want = answers(case, data, x)
    assert model.classes == want.shape[1]
    got = open_session(model.onnx).logits(x)
    np.testing.assert_allclose(got, want, atol=case.tolerance * np.abs(want).max())


@pytest.mark.parametrize("name", FILES)
def test_every_verb_takes_it(name, tmp_path, monkeypatch, rng):
    """Quantized, the file agrees with its float model, which is fed as its makers would feed it."""
    monkeypatch.chdir(tmp_path)
    case = FILES[name]
    Path("model.onnx").write_bytes(case.make())
    reads = "range = [0, 255]\n" if name == "bytes" else "mean = [0, 0, 0]\nstd = [1, 1, 1]\n"
    Path("model.toml").write_text(f"[input]\nshape = [3, 8, 8]\n{reads}")
    classes = 2 if name.startswith("one ") else 10
    np.savez(
        "images.npz", x=rng.integers(0, 256, (40, *SHAPE), np.uint8), y=np.arange(40) % classes
    )
    assert run("scan", "model.onnx") == 0
    assert run("quantize", "model.onnx", "--bits", 8, "--rounding", "nearest", "--out", "q.onnx",
               "--calibration", "images.npz") == 0  # fmt: skip
    for file, more in (("q.onnx", ("--card", "model.toml")), ("model.onnx", ())):
        judged = ("--reference", "model.onnx", "--test", "images.npz", "--report", "r.json")
        assert run("gate", file, *judged, *more) in {3, 4}  # labels at chance are no evidence
        report = json.loads(Path("r.json").read_bytes())
        agreement = {m["variant"]: m["agreement"] for m in report["measurements"]}
        assert agreement["result"]["value"] >= (90 if file == "q.onnx" else 100)


def test_a_file_that_is_as_it_should_be_stays_as_it_is():
    proto = onnx.ModelProto.FromString(residual_net())
    assert as_classifier(proto, NOTHING_STATED, where="m") is proto
    assert as_classifier(proto, IMAGES, where="m") is proto


def test_a_batch_of_minus_one_is_any(rng):
    """As Paddle's exporter writes it."""
    proto = onnx.ModelProto.FromString(open_size())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    model = exported(proto.SerializeToString(), IMAGES)
    assert open_session(model.onnx).logits(np.zeros((3, *SHAPE), np.float32)).shape == (3, 10)


@pytest.fixture
def unlabelled(tmp_path, monkeypatch, rng) -> Path:
    """A model with a card, and pictures that nobody has labelled."""
    monkeypatch.chdir(tmp_path)
    net = net_with(*SHAPE)
    patches = net.node("Conv", net.x, net.weight(16, 3, 4, 4), strides=[4, 4])
    scores = net.node("MatMul", net.node("Flatten", patches), net.weight(64, 10))
    first = net.constant(np.eye(1, 10, dtype=np.float32)[0])
    Path("model.onnx").write_bytes(written(net, net.node("Add", scores, first), "N", 10))
    Path("model.toml").write_text("[input]\nshape = [3, 8, 8]\nrange = [-1, 1]\n")
    np.savez("images.npz", x=rng.integers(0, 256, (400, *SHAPE), np.uint8))
    return tmp_path


JUDGED = ("gate", "model.onnx", "--reference", "model.onnx", "--report", "r.json")


def test_pictures_without_labels_show_that_a_file_answers_as_its_float_model(unlabelled):
    assert run(*JUDGED, "--test", "images.npz", "--policy", "unlabelled") == 0
    report = json.loads(Path("r.json").read_bytes())
    made = {check["name"] for check in report["checks"]}
    assert "agreement" in made
    assert not {"accuracy", "accuracy_drop", "class_drop"} & made
    assert "accuracy_drop: the test images have no labels" in report["not_measured"]
    assert run(*JUDGED, "--test", "images.npz", "--policy", "default") == 2
    alone = ("gate", "model.onnx", "--test", "images.npz", "--policy", "unlabelled")
    assert run(*alone) == 2


def test_pictures_that_are_all_answered_alike_show_nothing(unlabelled):
    rng = np.random.default_rng(1)
    nearly = 128 + rng.integers(0, 2, (400, *SHAPE), np.uint8)
    np.savez("same.npz", x=nearly)
    assert run(*JUDGED, "--test", "same.npz", "--policy", "unlabelled") == 4
    assert "the same answer" in " ".join(json.loads(Path("r.json").read_bytes())["reasons"])


def test_a_report_says_that_the_file_takes_something_else(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(channels_last())
    Path("model.toml").write_text("[input]\nshape = [3, 8, 8]\nrange = [-1, 1]\n")
    np.savez("images.npz", x=rng.integers(0, 256, (40, *SHAPE), np.uint8))
    run("sanitize", "model.onnx", "--calibration", "images.npz", "--report", "r.json", "--seed", 1)
    said = (
        "the file takes and gives float32 (N, 3, 8, 8) to (N, 10), other than the model that came"
    )
    assert said in json.loads(Path("r.json").read_bytes())["notes"]


def several_outputs() -> bytes:
    net = net_with(*SHAPE)
    output = body(net, net.x)
    proto = onnx.ModelProto.FromString(written(net, output, "N", 10))
    features = proto.graph.output.add()
    features.CopyFrom(onnx.ValueInfoProto.FromString(proto.graph.output[0].SerializeToString()))
    features.name = next(n.output[0] for n in proto.graph.node if n.op_type == "Flatten")
    features.type.tensor_type.shape.dim[1].dim_value = 8
    outputs = list(reversed(proto.graph.output))
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    return proto.SerializeToString()


def test_of_several_outputs_one_is_named_and_the_others_stay(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(several_outputs())
    Path("model.toml").write_text("[input]\nshape = [3, 8, 8]\nrange = [-1, 1]\n")
    np.savez("images.npz", x=rng.integers(0, 256, (40, *SHAPE), np.uint8), y=np.arange(40) % 10)
    made = ("--rounding", "nearest", "--out", "q.onnx", "--calibration", "images.npz")
    assert run("quantize", "model.onnx", *made) == 2
    assert run("quantize", "model.onnx", *made, "--output", "wrong") == 2
    assert run("quantize", "model.onnx", *made, "--output", "scores") == 0
    session = ort.InferenceSession("q.onnx")
    assert [len(output.shape) for output in session.get_outputs()] == [2, 2]
    assert session.get_outputs()[0].name == "scores"
    judged = ("--reference", "model.onnx", "--card", "model.toml", "--test", "images.npz")
    assert run("gate", "q.onnx", *judged, "--output", "scores", "--report", "r.json") in {3, 4}
    report = json.loads(Path("r.json").read_bytes())
    assert report["provenance"]["differences"] == []


def segmentation() -> bytes:
    net = net_with(*SHAPE)
    return written(net, net.conv(net.x, 10, 3, 1, 1), "N", 10, 8, 8)


def class_numbers() -> bytes:
    net = net_with(*SHAPE)
    best = net.node("ArgMax", body(net, net.x), axis=1, keepdims=0)
    return written(net, best, "N", dtype=ir.DataType.INT64)


@pytest.mark.parametrize(
    ("data", "stated", "said"),
    [
        (open_size, NOTHING_STATED, "leaves the size of images open"),
        (flat, NOTHING_STATED, "takes (?, 192), not images"),
        (flat, Stated((3, 9, 9)), "takes (192), not (3, 9, 9)"),
        (channels_last, Stated((3, 9, 9)), "takes (8, 8, 3), not (3, 9, 9)"),
        (takes_bytes, Stated(SHAPE, pixel_range=(-2.0, 2.0)), "the card makes -2 to 2 of pixels"),
        (several_outputs, NOTHING_STATED, "has 2 outputs"),
        (several_outputs, Stated(output="best"), "has no output 'best'"),
        (residual_net, Stated(output="best"), "has no output 'best'"),
        (segmentation, NOTHING_STATED, "not (batch, classes)"),
        (class_numbers, NOTHING_STATED, "gives int64, not a score for each class"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(data, stated, said):
    with pytest.raises((InputError, UsageError)) as error:
        as_classifier(parse_proto(data(), "m.onnx"), stated, where="m.onnx")
    assert said in str(error.value)


def test_classes_that_a_file_claims_and_does_not_give_are_an_error():
    """The end of a Slice is computed, and no shape inferred: six classes, said to be ten."""
    net = net_with(*SHAPE)
    scores = body(net, net.x, classes=8)
    largest = net.node("ReduceMax", net.node("Sigmoid", scores), keepdims=0)
    none = net.node(
        "Mul", net.node("Cast", largest, to=ir.DataType.INT64), net.constant(np.array(0))
    )
    end = net.node("Reshape", net.node("Add", none, net.constant(np.array(6))),
                   net.constant(np.array([1])))  # fmt: skip
    start, axis = net.constant(np.array([0])), net.constant(np.array([1]))
    data = written(net, net.node("Slice", scores, start, end, axis), "N", 10)
    with pytest.raises(InputError, match=r"gives \(2, 6\) for a batch of 2, not \(2, 10\)"):
        exported(data, NOTHING_STATED)


def test_a_card_says_what_becomes_of_pixels():
    spec = {"shape": (3, 8, 8)}
    plain = ModelCard.model_validate({"input": spec | {"mean": (0.5,) * 3, "std": (0.25,) * 3}})
    caffe = ModelCard.model_validate({"input": spec | {
        "range": (0, 255), "mean": (104, 117, 123), "std": (1, 1, 1), "channel_order": "bgr",
    }})  # fmt: skip
    keras = ModelCard.model_validate({"input": spec | {"range": (-1, 1)}})
    assert (plain.input.unit_mean, plain.input.pixel_range) == ((0.5,) * 3, (-2.0, 2.0))
    assert keras.input.pixel_range == (-1.0, 1.0)
    assert keras.input.unit_mean == (0.5,) * 3
    np.testing.assert_allclose(caffe.input.pixel_range, (-123, 151))


def test_channels_are_handed_over_in_the_order_that_the_model_takes(tmp_path):
    from qdeploy.inputs.sources import Given, resolve

    (tmp_path / "m.toml").write_text(
        "[input]\nshape = [3, 1, 1]\nrange = [0, 255]\nchannel_order = 'bgr'\n"
        "mean = [100, 0, 0]\nstd = [1, 1, 1]\n"
    )
    preprocessing = resolve(tmp_path / "m.onnx", Given()).preprocessing
    pixel = np.array([10, 20, 30], np.float32).reshape(1, 3, 1, 1) / 255
    np.testing.assert_allclose(preprocessing.normalise(pixel).ravel(), [-70, 20, 10], atol=1e-4)


@pytest.mark.parametrize("lines", ["", "mean = [0, 0, 0]", "range = [1, 0]", "std = [1, 1]"])
def test_a_card_that_does_not_say_it_is_refused(lines, tmp_path):
    from qdeploy.settings.card import load_card

    (tmp_path / "m.toml").write_text(f"[input]\nshape = [3, 8, 8]\n{lines}\n")
    with pytest.raises(InputError):
        load_card(tmp_path / "m.toml")
