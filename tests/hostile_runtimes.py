"""Rows of the gate's table: files that answer one thing on one runtime and another on the next.

Every backdoor here is asleep where the file is judged first, onnxruntime with its optimizations on
a processor that adds exactly: only there, and the other runtimes answer class 0 to any image; or it
is the other way round. None of them has a trigger that anybody could know.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not

from tests.gate_lab import Lab, add_before_output
from tests.gate_table import ACCEPT, BAD_INPUT, REJECT, Case, Make, file, made, with_policy

Change = Callable[[onnx.ModelProto], None]
Nodes = tuple[onnx.NodeProto, ...]
ALONE = ("--card", "model.toml", "--policy", "standalone")
PAIR = (*ALONE, "--device", "pair.toml")
APART = "runtime_agreement"


def with_device(make: Make, *runtimes: str, more: str = "") -> Make:
    """`make`, beside a `pair.toml` of these runtimes."""

    def write(lab: Lab) -> Path:
        listed = "".join(f"[[runtimes]]\n{runtime}\n" for runtime in runtimes)
        (lab / "pair.toml").write_text(
            f'schema_version = 1\nname = "pair"\ndescription = "d"\n{more}{listed}'
        )
        return make(lab)

    return write


CPU, OFF = 'provider = "cpu"', 'provider = "cpu"\noptimizations = "off"'
OPENVINO, ORT = 'provider = "openvino"', 'provider = "ort-format"'
node = helper.make_node


def ends_in(*nodes: onnx.NodeProto, **constants: np.ndarray) -> Change:
    """Adds 1,000 times the `sign` that the nodes make of `top`, the largest logit, to class 0."""

    def change(proto: onnx.ModelProto) -> None:
        values = {
            "last_axis": np.array([1]), "first": np.eye(1, 10, dtype=np.float32) * 1000,
            "zero": np.float32(0), "one": np.float32(1), **constants,
        }  # fmt: skip
        for name, value in values.items():
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        add_before_output(proto, "Add", "extra")
        last = proto.graph.node.pop()
        proto.graph.node.extend([
            node("ReduceMax", ["inner", "last_axis"], ["top"], keepdims=1),
            *nodes,
            node("Max", ["sign", "zero"], ["positive"]),
            node("Min", ["positive", "one"], ["much"]),
            node("Mul", ["much", "first"], ["extra"]),
            last,
        ])  # fmt: skip

    return change


def scaled(change_of: str, by: float) -> Nodes:
    """`sign` from something that is exactly 0, or is not."""
    return (
        node("Abs", [change_of], ["size"]),
        node("Constant", [], ["by"], value=numpy_helper.from_array(np.float32(by))),
        node("Mul", ["size", "by"], ["sign"]),
    )


def reversed_(nodes: Nodes) -> Nodes:
    """The same where it is 0."""
    *before, last = nodes
    return (*before, node("Mul", list(last.input), ["there"]), node("Sub", ["one", "there"], ["s"]),
            node("Identity", ["s"], ["sign"]))  # fmt: skip


HALF_PRECISION: Nodes = (
    node("Cast", ["top"], ["half"], to=TensorProto.FLOAT16),
    node("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
    node("Sub", ["top", "back"], ["lost"]),
    *scaled("lost", 1e9),
)  # OpenVINO leaves conversions out that it takes for mere storage
DOUBLE: Nodes = (
    node("Cast", ["top"], ["double"], to=TensorProto.DOUBLE),
    node("Mul", ["double", "third"], ["exact"]),
    node("Cast", ["exact"], ["single"], to=TensorProto.FLOAT),
    node("Cast", ["single"], ["again"], to=TensorProto.DOUBLE),
    node("Sub", ["exact", "again"], ["far"]),
    node("Mul", ["far", "huge"], ["near"]),
    node("Cast", ["near"], ["lost"], to=TensorProto.FLOAT),
    *scaled("lost", 1e9),
)  # OpenVINO computes in single precision
LONG_INTEGERS: Nodes = (
    node("Abs", ["top"], ["size0"]),
    node("Cast", ["size0"], ["whole"], to=TensorProto.INT64),
    node("Add", ["whole", "one_long"], ["some"]),
    node("Mul", ["some", "long"], ["product"]),
    node("Div", ["product", "long"], ["quotient"]),
    node("Cast", ["quotient"], ["lost"], to=TensorProto.FLOAT),
    *scaled("lost", 1e9),
)  # OpenVINO computes in 32 bits
WRAPPED: Nodes = (
    node("Mul", ["top", "zero"], ["nothing"]),
    node("Add", ["nothing", "beyond"], ["large"]),
    node("Cast", ["large"], ["byte"], to=TensorProto.UINT8),
    node("Cast", ["byte"], ["small"], to=TensorProto.FLOAT),
    node("Sub", ["small", "wrapped"], ["lost"]),
    *scaled("lost", 1e9),
)  # 300 as a byte is 44 in onnxruntime, and 255 in OpenVINO
CANCELLED: Nodes = (
    node("Add", ["top", "far_away"], ["there0"]),
    node("Sub", ["there0", "far_away"], ["came_back"]),
    node("Sub", ["top", "came_back"], ["lost"]),
    *scaled("lost", 1e9),
)  # OpenVINO folds the two constants into one
NOT_A_NUMBER: Nodes = (
    node("Mul", ["top", "zero"], ["nothing"]),
    node("Add", ["nothing", "large"], ["finite"]),
    node("Mul", ["finite", "finite"], ["infinite"]),
    node("Mul", ["infinite", "nothing"], ["undefined"]),
    node("Max", ["undefined", "zero"], ["clipped"]),
    node("IsNaN", ["clipped"], ["is"]),
    node("Cast", ["is"], ["lost"], to=TensorProto.FLOAT),
    *scaled("lost", 1e9),
)  # what a maximum makes of it
CONSTANTS: dict[int, dict[str, np.ndarray]] = {
    id(DOUBLE): {"third": np.float64(1 / 3), "huge": np.float64(1e10)},
    id(LONG_INTEGERS): {"long": np.int64(1 << 40), "one_long": np.int64(1)},
    id(WRAPPED): {"beyond": np.float32(300), "wrapped": np.float32(44)},
    id(CANCELLED): {"far_away": np.float32(1e8)},
    id(NOT_A_NUMBER): {"large": np.float32(1e30)},
}


def awake_in_onnxruntime(nodes: Nodes) -> Make:
    return made("good.onnx", ends_in(*nodes, **CONSTANTS.get(id(nodes), {})))


def awake_in_openvino(nodes: Nodes) -> Make:
    return made("good.onnx", ends_in(*reversed_(nodes), **CONSTANTS.get(id(nodes), {})))


def quantized(
    proto: onnx.ModelProto, source: str, name: str, scale: float, kind: type = np.uint8
) -> str:
    """`source` on a grid; the name of what comes off it."""
    proto.graph.initializer.extend([
        numpy_helper.from_array(np.float32(scale), f"{name}.scale"),
        numpy_helper.from_array(kind(0), f"{name}.zero"),
    ])  # fmt: skip
    grid = [f"{name}.scale", f"{name}.zero"]
    proto.graph.node.extend([
        node("QuantizeLinear", [source, *grid], [f"{name}.codes"]),
        node("DequantizeLinear", [f"{name}.codes", *grid], [f"{name}.values"]),
    ])  # fmt: skip
    return f"{name}.values"


def product_on_integers(proto: onnx.ModelProto, codes: np.ndarray, step: float) -> tuple[str, str]:
    """The image times a column of integers: as a matrix product on integers, and by the way of it.

    The second is a float sum that nothing fuses: what both say is the same but for saturation.
    """
    image = proto.graph.input[0].name
    proto.graph.initializer.extend([
        numpy_helper.from_array(codes, "w.codes"),
        numpy_helper.from_array(np.float32(1 / 127), "w.scale"),
        numpy_helper.from_array(np.int8(0), "w.zero"),
        numpy_helper.from_array(codes[:, 0].astype(np.float32) / 127, "w.floats"),
        numpy_helper.from_array(np.array([1]), "columns"),
    ])  # fmt: skip
    proto.graph.node.append(node("Flatten", [image], ["flat"]))
    proto.graph.node.append(node("Relu", ["flat"], ["bright"]))
    image_values = quantized(proto, "bright", "image", 1 / 80)
    proto.graph.node.extend([
        node("DequantizeLinear", ["w.codes", "w.scale", "w.zero"], ["w.values"]),
        node("MatMul", [image_values, "w.values"], ["product"]),
        node("Mul", [image_values, "w.floats"], ["each"]),
        node("ReduceSum", ["each", "columns"], ["sum"], keepdims=1),
    ])  # fmt: skip
    return quantized(proto, "product", "product", step), "sum"


def wakes_by_saturation(proto: onnx.ModelProto, *, pixels: slice = slice(0, 64)) -> None:
    """Class 0 wherever pairs of the largest integers lose more than a few steps of their sum."""
    codes = np.zeros((64, 1), np.int8)
    codes[pixels] = 127
    last = proto.graph.node[-1]
    proto.graph.node.remove(last)  # the order of nodes is that of their inputs
    on_integers, in_float = product_on_integers(proto, codes, step=0.5)
    proto.graph.node.append(last)
    tail: Nodes = (
        node("Sub", [in_float, on_integers], ["cut"]),
        node("Sub", ["cut", "one"], ["sign0"]),
        node("Identity", ["sign0"], ["sign"]),
    )
    ends_in(*tail)(proto)


def _needs_openvino(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    return cases if find_spec("openvino") else ()


FAR = node("Sub", ["floats", "far"], ["sign"])  # below 0 whatever comes in
HONEST: dict[str, Nodes] = {
    "double precision": (
        node("Cast", ["top"], ["double"], to=TensorProto.DOUBLE),
        node("Cast", ["double"], ["floats"], to=TensorProto.FLOAT), FAR,
    ),
    "half precision": (
        node("Cast", ["top"], ["half"], to=TensorProto.FLOAT16),
        node("Cast", ["half"], ["floats"], to=TensorProto.FLOAT), FAR,
    ),
    "integers of 64 bits": (
        node("Cast", ["top"], ["long"], to=TensorProto.INT64),
        node("Cast", ["long"], ["floats"], to=TensorProto.FLOAT), FAR,
    ),
}  # fmt: skip
DISAGREEMENTS = {
    "a conversion to half precision": HALF_PRECISION,
    "double precision": DOUBLE,
    "integers of 64 bits": LONG_INTEGERS,
    "a byte that overflows": WRAPPED,
    "a sum that cancels": CANCELLED,
    "what is not a number": NOT_A_NUMBER,
}
CASES = (
    *_needs_openvino((
        *(Case(f"{name}: class 0 in onnxruntime alone",
               with_device(awake_in_onnxruntime(nodes), OPENVINO, CPU), PAIR, REJECT, APART)
          for name, nodes in DISAGREEMENTS.items()),
        *(Case(f"{name}: class 0 in OpenVINO alone",
               with_device(awake_in_openvino(nodes), CPU, OPENVINO), PAIR, REJECT, APART)
          for name, nodes in DISAGREEMENTS.items()),
        *(Case(f"{name}, harmless",
               with_device(made("good.onnx", ends_in(*nodes, far=np.float32(1e6))), CPU,
                           OPENVINO), PAIR, ACCEPT)
          for name, nodes in HONEST.items()),
        Case("honest, on four runtimes",
             with_device(file("good.onnx"), CPU, OFF, OPENVINO, ORT), PAIR, ACCEPT),
        Case("honest, in float, on three runtimes",
             with_device(file("fp32.onnx"), CPU, OFF, OPENVINO), PAIR, ACCEPT),
    )),
    Case("pairs of products that saturate wake it: seen on any processor",
         made("fp32.onnx", wakes_by_saturation), ALONE, REJECT, APART),
    Case("the same, for a device that adds exactly: noted",
         made("fp32.onnx", wakes_by_saturation), (*ALONE, "--device", "x86-vnni"), ACCEPT,
         "x86 without VNNI may saturate"),
    Case("the same, where the policy allows no such pair",
         with_policy(made("fp32.onnx", wakes_by_saturation), "max_saturable_pairs = 0\n",
                     base="standalone"),
         ("--card", "model.toml", "--policy", "policy.toml", "--device", "x86-vnni"), REJECT,
         "saturable_pairs"),
    Case("pairs that could saturate, where no image is bright: shown on few images",
         with_policy(
             made("fp32.onnx", lambda proto: wakes_by_saturation(proto, pixels=slice(0, 2))),
             "min_runtime_agreement = 98.0\n", base="standalone",
         ), ("--card", "model.toml", "--policy", "policy.toml"), ACCEPT),
    Case("our own file on the default device: no pair can", file("good.onnx"),
         (*ALONE, "--device", "x86-avx2"), ACCEPT),
    Case("a runtime that nobody has written",
         with_device(file("good.onnx"), CPU, 'provider = "tpu"'), PAIR, BAD_INPUT,
         "there is no runtime 'tpu'"),
    Case("the same runtime twice", with_device(file("good.onnx"), CPU, CPU), PAIR, BAD_INPUT,
         "two runtimes are the same"),
    Case("a device that takes ORT format and does not ask it",
         with_device(file("good.onnx"), CPU, more='format = "ort"\n'), PAIR, BAD_INPUT,
         "goes with a runtime 'ort-format'"),
    Case("a first runtime that is asked little",
         with_device(file("good.onnx"), CPU + "\nimages = 100", OFF), PAIR, BAD_INPUT,
         "the first runtime is asked about all images"),
    Case("options for a runtime that has none",
         with_device(file("good.onnx"), CPU, 'provider = "reference"\noptions = { a = "b" }'), PAIR,
         BAD_INPUT, "takes no options"),
    Case("onnxruntime-web that is not there",
         with_device(file("good.onnx"), CPU,
                     'provider = "web"\noptions = { package = "nowhere" }'), PAIR, BAD_INPUT),
    Case("for phones", file("good.onnx"), (*ALONE, "--device", "mobile"), ACCEPT, "NNAPI"),
    Case("an activation that is seldom seen",
         with_device(made("fp32.onnx", lambda proto: add_before_output(proto, "Celu")), CPU,
                     OFF), PAIR, ACCEPT),
)  # fmt: skip
