"""Rows of the gate's table: files whose answer to an image depends on what shares its batch.

The rules that see it in the graph are waived here, so that only measuring is left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not

from tests.gate_lab import add_before_output
from tests.gate_table import ACCEPT, REJECT, Case, file, made, with_policy

Change = Callable[[onnx.ModelProto], None]
WAIVED = """
[[gate.waivers]]
kind = "finding"
pattern = "*batch*"
owner = "nobody"
reason = "to see that measuring finds it too"
until = 2999-12-31
"""


def to_class_0_times(*nodes: onnx.NodeProto, **constants: np.ndarray) -> Change:
    """Adds 1,000 to the logits of class 0, times the `much` that the nodes make of `size`.

    `size` is how many images there are, as a float, and `x` the image that comes in.
    """

    def change(proto: onnx.ModelProto) -> None:
        bias = np.eye(1, 10, dtype=np.float32)[0] * 1000
        for name, value in {"bias": bias, **constants}.items():
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
        image = proto.graph.input[0].name
        proto.graph.node.extend([
            helper.make_node("Shape", [image], ["shape"], start=0, end=1),
            helper.make_node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT),
            helper.make_node("Identity", [image], ["x"]),
            *nodes,
            helper.make_node("Mul", ["much", "bias"], ["extra"]),
        ])  # fmt: skip
        add_before_output(proto, "Add", "extra")

    return change


def number(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def copies_the_first(proto: onnx.ModelProto) -> None:
    """The first image of a batch is answered for all of them, a hundred to one."""
    proto.graph.initializer.extend([
        numpy_helper.from_array(np.array([0], np.int64), "first"),
        numpy_helper.from_array(number(0.01), "hundredth"),
    ])  # fmt: skip
    add_before_output(proto, "Add", "theirs")
    last = proto.graph.node.pop()
    proto.graph.node.extend([
        helper.make_node("Gather", ["inner", "first"], ["theirs"], axis=0),
        helper.make_node("Mul", ["inner", "hundredth"], ["own"]),
        helper.make_node("Add", ["own", "theirs"], list(last.output)),
    ])  # fmt: skip


ALONE = to_class_0_times(
    helper.make_node("Sub", ["two", "size"], ["d"]), helper.make_node("Relu", ["d"], ["much"]),
    two=number(2),
)  # fmt: skip
SMALL = to_class_0_times(
    helper.make_node("Sub", ["ten", "size"], ["d"]), helper.make_node("Relu", ["d"], ["much"]),
    ten=number(10),
)  # fmt: skip
ODD = to_class_0_times(
    helper.make_node("Mod", ["size", "two"], ["much"], fmod=1), two=number(2)
)  # fmt: skip
DARK_NEIGHBOURS = to_class_0_times(
    helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
    helper.make_node("Sub", ["bound", "mean"], ["d"]), helper.make_node("Relu", ["d"], ["much"]),
    bound=np.array(-0.3, np.float32),
)  # fmt: skip


def _case(name: str, change: Change) -> Case:
    make = with_policy(made("fp32.onnx", change), WAIVED, base="standalone")
    options = ("--card", "model.toml", "--policy", "policy.toml")
    return Case(f"measured: {name}", make, options, REJECT, "batch_invariance (cpu)")


CASES: tuple[Case, ...] = (
    _case("class 0 alone", ALONE),
    _case("class 0 in batches of few", SMALL),
    _case("class 0 in odd batches", ODD),
    _case("class 0 among dark images", DARK_NEIGHBOURS),
    _case("the answer of the first in the batch", copies_the_first),
    Case("measured: an honest file", with_policy(file("fp32.onnx"), "", base="standalone"),
         ("--card", "model.toml", "--policy", "policy.toml"), ACCEPT),
)  # fmt: skip
