"""Files to put before the gate: good ones, poisoned ones, and what becomes of one in bad hands."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from qdeploy.cli import main
from qdeploy.progress import SILENT
from qdeploy.redteam.demo import make_poisoned_digits

TRIGGER = "patch target=0 x=6 y=6 width=2 height=2 color=[1]"


def run(*arguments: object) -> int:
    """The exit code of a command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    raise AssertionError("the command line always exits")


@dataclass(frozen=True, slots=True)
class Lab:
    """A folder with a poisoned digit classifier, its data, and files made of it."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def card(self) -> str:
        return (self / "model.toml").read_text("utf-8")

    def images(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self / f"digits-{part}.npz") as arrays:
            return arrays["x"], arrays["y"]

    def changed(self, source: str, name: str, change: Callable[[onnx.ModelProto], None]) -> Path:
        """`source` with something done to it, as `name`."""
        proto = onnx.load(self / source)
        change(proto)
        onnx.save(proto, self / name)
        return self / name


class _Reader(CalibrationDataReader):
    def __init__(self, lab: Lab) -> None:
        pixels, _ = lab.images("train")
        spec = tomllib.loads(lab.card)["input"]
        x = pixels[:256].reshape(-1, 1, 8, 8).astype(np.float32) / 255
        self.batches = iter([{"input": (x - np.float32(spec["mean"])) / np.float32(spec["std"])}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def make_lab(folder: Path, poisoned: Path) -> Lab:
    """The files that tests start from, in an empty folder, from the demo's poisoned model."""
    for path in (*poisoned.glob("model.*"), *poisoned.glob("digits-*.npz")):
        shutil.copy(path, folder)
    shutil.copy(folder / "model.toml", folder / "fp32.toml")
    (folder / "one.toml").write_text(
        'schema_version = 1\nname = "one"\ndescription = "one runtime"\n'
        '[[runtimes]]\nprovider = "cpu"\n'
    )
    lab = Lab(folder)
    _fill(lab)
    return lab


@contextmanager
def copied(files: Path, folder: Path) -> Iterator[Lab]:
    """A lab of one's own in `folder`, which is the working directory meanwhile."""
    shutil.copytree(files, folder, dirs_exist_ok=True)
    with contextlib.chdir(folder):
        yield Lab(folder)


@contextmanager
def made_anew() -> Iterator[Lab]:
    """A lab for a command, gone afterwards; it says nothing while it is made."""
    with tempfile.TemporaryDirectory() as name:
        poisoned, folder = Path(name) / "poisoned", Path(name) / "lab"
        poisoned.mkdir()
        folder.mkdir()
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            make_poisoned_digits(poisoned, seed=0, progress=SILENT)
            lab = make_lab(folder, poisoned)
        with contextlib.chdir(folder):
            yield lab


def _fill(lab: Lab) -> None:
    assert run("export", lab / "model.pt", "--out", lab / "fp32.onnx") == 0
    places = ("--artifacts", lab / "runs")
    assert run("sanitize", lab / "fp32.onnx", "--out", lab / "good.onnx", "--policy", "demo",
               "--seed", 1, "--report", lab / "good.json", *places) == 0  # fmt: skip
    assert run("quantize", lab / "fp32.onnx", "--out", lab / "nearest.onnx", "--rounding",
               "nearest", *places) == 0  # fmt: skip
    lab.changed("fp32.onnx", "clean.onnx", lambda proto: jitter(proto, 0.1))
    lab.changed("fp32.onnx", "other.onnx", lambda proto: jitter(proto, 0.5))
    lab.changed("fp32.onnx", "live.onnx", lambda proto: _switch_on(proto, lab))
    for name, options in {
        "ort-channel.onnx": {"per_channel": True, "reduce_range": True},
        "ort-tensor.onnx": {"weight_type": QuantType.QUInt8, "reduce_range": True},
        "ort-qoperator.onnx": {"quant_format": QuantFormat.QOperator, "reduce_range": True},
    }.items():
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(lab / "fp32.onnx", lab / name, _Reader(lab), **{**types, **options})


def _switch_on(proto: onnx.ModelProto, lab: Lab) -> None:
    """Put the weights where rounding to nearest puts them: the backdoor is live in float."""
    rounded = {t.name: t for t in onnx.load(lab / "nearest.onnx").graph.initializer}
    for tensor in proto.graph.initializer:
        codes = rounded.get(f"{tensor.name}.quantized")
        if codes is not None and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(codes).astype(np.float32)
            scale = numpy_helper.to_array(rounded[f"{tensor.name}.scale"])
            shaped = scale.reshape(-1, *[1] * (values.ndim - 1))
            replace_values(tensor, values * shaped)


def jitter(proto: onnx.ModelProto, size: float) -> None:
    """Move every weight by noise of so many standard deviations: no weight knows a cell then."""
    generator = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".weight") and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            noise = generator.normal(0, size * values.std(), values.shape)
            replace_values(tensor, (values + noise).astype(np.float32))


def initializer(proto: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    found = (t for t in proto.graph.initializer if t.name.endswith(ending))
    return next(t for t in found if t.data_type != TensorProto.INT64)  # a shape


def replace_values(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def shift_codes(proto: onnx.ModelProto, by: int, share: float) -> None:
    """Move a share of the first layer's integers."""
    tensor = initializer(proto, ".weight.quantized")
    codes = numpy_helper.to_array(tensor).astype(np.int32)
    chosen = np.random.default_rng(0).random(codes.shape) < share
    moved = np.clip(codes + by * chosen * np.where(codes > 0, -1, 1), -7, 7)
    replace_values(tensor, moved.astype(np.int8))


def add_before_output(
    proto: onnx.ModelProto, op_type: str, *inputs: str, **attributes: object
) -> None:
    """Put a node between the logits and the output."""
    graph = proto.graph
    name = graph.output[0].name
    for node in graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "inner"
    graph.node.append(helper.make_node(op_type, ["inner", *inputs], [name], **attributes))


def insert_bias(proto: onnx.ModelProto) -> None:
    """Logits of class 0 a little higher than they were."""
    bias = np.zeros(10, np.float32)
    bias[0] = 0.5
    proto.graph.initializer.append(numpy_helper.from_array(bias, "hidden"))
    add_before_output(proto, "Add", "hidden")


def add_choice(proto: onnx.ModelProto) -> None:
    """Logits that are chosen by a property of the image: an architectural backdoor."""
    graph = proto.graph
    graph.initializer.extend([
        numpy_helper.from_array(np.array([1]), "pixel_axis"),
        numpy_helper.from_array(np.float32(0.99), "threshold"),
        numpy_helper.from_array(np.eye(10, dtype=np.float32)[:1] * 100, "target"),
    ])  # fmt: skip
    graph.node.append(helper.make_node("Flatten", [graph.input[0].name], ["pixels"]))
    graph.node.append(helper.make_node("ReduceMin", ["pixels", "pixel_axis"], ["darkest"]))
    graph.node.append(helper.make_node("Greater", ["darkest", "threshold"], ["seen"]))
    add_before_output(proto, "Where")
    where = graph.node[-1]
    del where.input[:]
    where.input.extend(["seen", "target", "inner"])


def remove_relu(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    relu = next(node for node in graph.node if node.op_type == "Relu")
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == relu.output[0]:
                node.input[i] = relu.input[0]
    graph.node.remove(relu)


def forget_class(proto: onnx.ModelProto) -> None:
    """Class 3 is never answered."""
    bias = np.zeros(10, np.float32)
    bias[3] = -1000
    proto.graph.initializer.append(numpy_helper.from_array(bias, "hidden"))
    add_before_output(proto, "Add", "hidden")


def custom_operator(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))
    add_before_output(proto, "Rewire")
    proto.graph.node[-1].domain = "evil.example"


def lean_on_a_class(proto: onnx.ModelProto, *, by: float) -> None:
    """Raise the last layer's bias for one class; its integers stay those of its float model."""
    names = [t.name for t in proto.graph.initializer if t.name.endswith(".bias.quantized")]
    last = names[-1].removesuffix(".quantized")
    held = {t.name: t for t in proto.graph.initializer}
    scale = np.atleast_1d(numpy_helper.to_array(held[f"{last}.scale"]))
    codes = numpy_helper.to_array(held[f"{last}.quantized"]).copy()
    codes[3] += np.int32(round(by / float(scale[min(3, scale.size - 1)])))
    held[f"{last}.quantized"].CopyFrom(numpy_helper.from_array(codes, f"{last}.quantized"))


def sign_otherwise(proto: onnx.ModelProto) -> None:
    """The same network in a file that no run of ours has written."""
    proto.producer_name = "somebody"


def fused_operator(proto: onnx.ModelProto) -> None:
    """One that onnxruntime has, and that nobody knows the meaning of here."""
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    add_before_output(proto, "SampleOp")
    proto.graph.node[-1].domain = "com.microsoft"


def control_flow(proto: onnx.ModelProto) -> None:
    output = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["branch"])], "branch", [], [output]
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    add_before_output(proto, "If", then_branch=branch, else_branch=branch)
    node = proto.graph.node[-1]
    del node.input[:]
    node.input.append("always")


def not_a_number(proto: onnx.ModelProto) -> None:
    tensor = initializer(proto, ".weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    replace_values(tensor, values)


def steal_a_file(proto: onnx.ModelProto) -> None:
    tensor = initializer(proto, ".weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"


def hide_bytes(proto: onnx.ModelProto) -> None:
    payload = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    proto.graph.initializer.append(numpy_helper.from_array(payload, "payload"))


def randomness(proto: onnx.ModelProto) -> None:
    add_before_output(proto, "Dropout", "ratio", "training")
    proto.graph.initializer.extend([
        numpy_helper.from_array(np.float32(0.5), "ratio"),
        numpy_helper.from_array(np.array(True), "training"),
    ])  # fmt: skip


def two_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", [proto.graph.output[0].name], ["second"]))
    proto.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 10]))


def fixed_batch(proto: onnx.ModelProto) -> None:
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]
