"""Rows of the gate's table: graphs that cost, that hide, and that look at their neighbours."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not

from tests.gate_lab import add_before_output
from tests.gate_table import ALONE, BAD_INPUT, REJECT, Case, made


def _add(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], *constants: onnx.TensorProto) -> None:
    """`nodes`, whose last makes `extra`, and their sum with the logits."""
    proto.graph.initializer.extend(constants)
    proto.graph.node.extend(nodes)
    add_before_output(proto, "Add", "extra")


def counts_its_batch(proto: onnx.ModelProto) -> None:
    _add(
        proto,
        [helper.make_node("Shape", [proto.graph.input[0].name], ["s"], start=0, end=1),
         helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
         helper.make_node("Sub", ["two", "f"], ["d"]), helper.make_node("Relu", ["d"], ["extra"])],
        numpy_helper.from_array(np.array([2], np.float32), "two"),
    )  # fmt: skip


def sums_a_one_per_image(proto: onnx.ModelProto) -> None:
    _add(
        proto,
        [helper.make_node("Shape", [proto.graph.input[0].name], ["s"], start=0, end=1),
         helper.make_node("ConstantOfShape", ["s"], ["o"]),
         helper.make_node("Exp", ["o"], ["e"]), helper.make_node("ReduceSum", ["e"], ["extra"])],
    )  # fmt: skip


def looks_at_neighbours(proto: onnx.ModelProto) -> None:
    _add(proto, [helper.make_node("ReduceMax", ["inner", "axes"], ["extra"])],
         numpy_helper.from_array(np.array([0], np.int64), "axes"))  # fmt: skip
    nodes = list(proto.graph.node)
    reduce = nodes[-2]
    proto.graph.node.remove(reduce)
    proto.graph.node.insert(len(proto.graph.node) - 1, reduce)


def keeps_a_secret_in_a_function(proto: onnx.ModelProto) -> None:
    """The default of a local function's attribute lies in another file."""
    constant = helper.make_node("Constant", [], ["k"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="w")
    nodes = [constant, helper.make_node("Add", ["x", "k"], ["y"])]
    function = helper.make_function("l", "f", ["x"], ["y"], nodes, [helper.make_opsetid("", 21)])
    tensor = function.attribute_proto.add(name="w", type=onnx.AttributeProto.TENSOR).t
    tensor.data_type, tensor.data_location = TensorProto.FLOAT, TensorProto.EXTERNAL
    tensor.dims.append(10)
    tensor.external_data.add(key="location", value="model.toml")
    tensor.external_data.add(key="length", value="40")
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("l", 1))
    add_before_output(proto, "f", domain="l")


def reaches_out_of_its_folder(proto: onnx.ModelProto) -> None:
    keeps_a_secret_in_a_function(proto)
    proto.functions[0].attribute_proto[0].t.external_data[0].value = "../secret.bin"


def doubling_functions(proto: onnx.ModelProto) -> None:
    for i in range(40):
        callee, domain = (f"f{i + 1}", "l") if i < 39 else ("Relu", "")
        nodes = [helper.make_node(callee, ["x"], ["t"], domain=domain),
                 helper.make_node(callee, ["t"], ["y"], domain=domain)]  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("l", 1)]
        proto.functions.append(helper.make_function("l", f"f{i}", ["x"], ["y"], nodes, opsets))
    proto.opset_import.append(helper.make_opsetid("l", 1))
    add_before_output(proto, "f0", domain="l")


def doubling_functions_that_nobody_calls(proto: onnx.ModelProto) -> None:
    """A library that inlines them expands those too."""
    doubling_functions(proto)
    proto.graph.node[-1].op_type, proto.graph.node[-1].domain = "Relu", ""


def seventeen_gigabytes(proto: onnx.ModelProto) -> None:
    shape = numpy_helper.from_array(np.array([8, 1024, 1024, 512], np.int64), "shape")
    _add(proto, [helper.make_node("ConstantOfShape", ["shape"], ["c"]),
                 helper.make_node("ReduceMax", ["c"], ["extra"], keepdims=0)], shape)  # fmt: skip


def _scan(name: str, change, says: str) -> Case:
    return Case(f"scan: {name}", made("fp32.onnx", change), (), REJECT, says, command="scan")


CASES: tuple[Case, ...] = (
    _scan("counts its batch", counts_its_batch, "batch-size-in-values"),
    _scan("sums a one per image", sums_a_one_per_image, "batch-size-in-values"),
    _scan("looks at its neighbours", looks_at_neighbours, "across-batch"),
    _scan("a secret outside", reaches_out_of_its_folder, "external-path"),
    _scan("doubling functions", doubling_functions, "too-large"),
    _scan("doubling functions, not called", doubling_functions_that_nobody_calls, "too-large"),
    _scan("17 GB of zeros", seventeen_gigabytes, "huge-tensor"),
    Case("counts its batch", made("fp32.onnx", counts_its_batch), ALONE, REJECT, "batch"),
    Case("looks at its neighbours", made("fp32.onnx", looks_at_neighbours), ALONE, REJECT,
         "images"),
    Case("a secret in a function", made("fp32.onnx", keeps_a_secret_in_a_function), ALONE,
         BAD_INPUT, "other files"),
    Case("doubling functions", made("fp32.onnx", doubling_functions), ALONE, REJECT, "nodes"),
)  # fmt: skip
