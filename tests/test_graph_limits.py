"""A hostile graph is refused by counting, wherever in the message it hides what it holds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not
from onnxscript.rewriter._rewrite_rule import RewriteRule

from qdeploy.errors import InputError
from qdeploy.formats.onnx import limits
from qdeploy.formats.onnx.reading import read_single_file, read_untrusted
from qdeploy.formats.onnx.rules import inspect
from qdeploy.formats.onnx.tensors import all_nodes, all_tensors, size
from qdeploy.graph.prepare import prepare
from qdeploy.graph.simplify import LARGEST_FOLDED_VALUES, simplify
from qdeploy.messages.parts import parts
from tests.nets import residual_net


@pytest.fixture
def proto() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(residual_net())


def outside(tensor: onnx.TensorProto) -> None:
    """Let a tensor lie in `secret.bin`."""
    tensor.name, tensor.data_type = "hidden", TensorProto.FLOAT
    tensor.dims.append(4)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")


def in_a_functions_default(proto):
    function = proto.functions.add(domain="l", name="f")
    outside(function.attribute_proto.add(name="w", type=onnx.AttributeProto.TENSOR).t)


def in_a_graph_of_a_functions_node(proto):
    node = proto.functions.add(domain="l", name="f").node.add(op_type="If")
    outside(node.attribute.add(name="then_branch").g.initializer.add())


def in_graphs_of_a_default(proto):
    attribute = proto.functions.add(domain="l", name="f").attribute_proto.add(name="w")
    outside(attribute.graphs.add().node.add().attribute.add(name="value").tensors.add())


def in_training(proto):
    outside(proto.training_info.add().algorithm.initializer.add())


def in_sparse_values(proto):
    outside(proto.graph.sparse_initializer.add().values)


def in_sparse_indices_of_an_attribute(proto):
    outside(proto.graph.node[0].attribute.add(name="sparse_value").sparse_tensor.indices)


def in_an_attribute(proto):
    outside(proto.graph.node[0].attribute.add(name="value").t)


HIDING_PLACES = (
    in_a_functions_default, in_a_graph_of_a_functions_node, in_graphs_of_a_default, in_training,
    in_sparse_values, in_sparse_indices_of_an_attribute, in_an_attribute,
)  # fmt: skip


@pytest.mark.parametrize("hide", HIDING_PLACES)
def test_no_tensor_of_a_single_file_lies_in_another(proto, hide, tmp_path):
    hide(proto)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    with pytest.raises(InputError, match="keeps tensors in other files"):
        read_single_file(tmp_path / "model.onnx", allow=["*"])


@pytest.mark.parametrize("hide", HIDING_PLACES)
def test_no_tensor_reaches_out_of_the_models_folder(proto, hide, tmp_path):
    hide(proto)
    for tensor in all_tensors(proto):
        for entry in tensor.external_data:
            entry.value = "../secret.bin"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    with pytest.raises(InputError, match="outside"):
        read_untrusted(folder / "model.onnx")


def test_external_values_of_a_functions_default_are_read_like_all_others(proto, tmp_path):
    from qdeploy.formats.onnx.external import load_external

    in_a_functions_default(proto)
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    load_external(proto, tmp_path / "model.onnx")
    tensor = proto.functions[0].attribute_proto[0].t
    assert numpy_helper.to_array(tensor).tolist() == [0, 1, 2, 3]
    assert not tensor.external_data


@pytest.mark.parametrize("hide", HIDING_PLACES)
def test_values_that_are_no_numbers_are_found_wherever_they_lie(proto, hide):
    hide(proto)
    tensor = next(tensor for tensor in all_tensors(proto) if tensor.name == "hidden")
    tensor.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "hidden"))
    assert ("not-finite", "hidden") in {(f.rule, f.where) for f in inspect(proto)}


def test_nodes_of_graphs_in_functions_are_looked_at(proto):
    in_a_graph_of_a_functions_node(proto)
    inner = proto.functions[0].node[0].attribute[0].g
    inner.node.add(op_type="Rewire", domain="evil")
    assert "Rewire" in {node.op_type for node in all_nodes(proto)}
    assert "custom-operator" in {finding.rule for finding in inspect(proto)}


def test_every_kind_of_message_that_can_hold_a_tensor_is_walked():
    """Also those of a release to come: places are taken from the format's own description."""
    places = {
        (kind.name, field.name)
        for kind in onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in kind.fields
        if field.message_type is not None and field.message_type.name == "TensorProto"
    }
    assert len(places) >= 5
    for kind, field in places:
        message = getattr(onnx, kind)()
        where = getattr(message, field)
        (where.add() if hasattr(where, "add") else where).name = "found"
        assert any(getattr(part, "name", "") == "found" for part in parts(message)), (kind, field)


def many_nodes(proto):
    proto.graph.node.extend(
        helper.make_node("Relu", ["x"], [f"r{i}"]) for i in range(limits.MOST_NODES)
    )


def many_nodes_in_functions(proto):
    for i in range(limits.MOST_NODES):
        if i % 100 == 0:
            function = proto.functions.add(domain="l", name=f"f{i}")
        function.node.append(helper.make_node("Relu", ["x"], [f"r{i}"]))


def many_tensors(proto):
    for i in range(limits.MOST_TENSORS):
        proto.graph.initializer.add(name=f"k{i}", data_type=1, dims=[0])


def many_functions(proto):
    for i in range(limits.MOST_FUNCTIONS + 1):
        proto.functions.add(domain="l", name=f"f{i}")


def many_dimensions(proto):
    proto.graph.initializer.add(name="k", data_type=1, dims=[1] * 100_000)


def long_name(proto):
    proto.graph.node[0].name = "A" * (limits.LONGEST_NAME_BYTES + 1)


def long_domain_in_a_function(proto):
    proto.functions.add(domain="l" * (limits.LONGEST_NAME_BYTES + 1), name="f")


def much_text(proto):
    for _ in range(5):
        proto.metadata_props.add(key="k", value="A" * (limits.MOST_TEXT_BYTES // 4))


def _function(proto, name: str, *callees: str) -> None:
    function = proto.functions.add(domain="l", name=name, input=["x"], output=["y"])
    function.node.extend(helper.make_node(c, ["x"], ["y"], domain="l") for c in callees)


def doubling_calls(proto):
    for i in range(60):
        _function(proto, f"f{i}", f"f{i + 1}", f"f{i + 1}")
    _function(proto, "f60")
    proto.functions[-1].node.append(helper.make_node("Relu", ["x"], ["y"]))
    proto.graph.node.append(helper.make_node("f0", ["x"], ["y"], domain="l"))


def wide_calls(proto):
    _function(proto, "inner")
    proto.functions[0].node.extend(helper.make_node("Relu", ["x"], ["y"]) for _ in range(300))
    proto.graph.node.extend(
        helper.make_node("inner", ["x"], [f"r{i}"], domain="l") for i in range(300)
    )


def deep_calls(proto):
    for i in range(limits.DEEPEST_CALLS + 2):
        _function(proto, f"f{i}", f"f{i + 1}")
    proto.graph.node.append(helper.make_node("f0", ["x"], ["y"], domain="l"))


@pytest.mark.parametrize("make", [
    many_nodes, many_nodes_in_functions, many_tensors, many_functions, many_dimensions, long_name,
    long_domain_in_a_function, much_text, doubling_calls, wide_calls, deep_calls,
])  # fmt: skip
def test_what_is_too_large_is_refused_by_counting_alone(proto, make, monkeypatch):
    make(proto)

    def costly(*_: object, **__: object) -> None:
        raise AssertionError("a graph that is too large went on to a library")

    monkeypatch.setattr(limits, "outline", costly)
    monkeypatch.setattr(onnx.checker, "check_model", costly)
    found = list(inspect(proto))
    assert {finding.rule for finding in found} == {"too-large"}
    assert all(len(finding.message) < 300 for finding in found)


@pytest.mark.parametrize("circle", [("a",), ("a", "b"), ("a", "b", "c")])
def test_functions_that_call_themselves_are_refused(proto, circle):
    for name, callee in zip(circle, (*circle[1:], circle[0]), strict=True):
        _function(proto, name, callee)
    assert {finding.rule for finding in inspect(proto)} == {"recursive-function"}


def test_fields_that_onnx_does_not_know_are_named(proto):
    data = proto.SerializeToString() + bytes([0xFA, 0x3F, 4]) + b"text"  # field 1023
    found = onnx.ModelProto.FromString(data)
    assert "unknown-field" in {finding.rule for finding in inspect(found)}


def test_the_size_of_a_tensor_is_never_multiplied_out():
    assert size(onnx.TensorProto(dims=[2**62] * 16)) == 1 << 62
    assert size(onnx.TensorProto(dims=[2**62] * 16 + [0])) == 0
    assert size(onnx.TensorProto(dims=[3, 4])) == 12


def _before(proto: onnx.ModelProto, op_type: str, *constants: np.ndarray) -> None:
    names = [f"constant{i}" for i in range(len(constants))]
    for name, array in zip(names, constants, strict=True):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    image = proto.graph.input[0].name
    data = [] if op_type in {"ConstantOfShape", "Range"} else [image]
    if op_type == "Resize":
        names = ["", "", *names]
    proto.graph.node.insert(0, helper.make_node(op_type, [*data, *names], ["large"]))


HUGE = np.array([64, 1024, 1024, 64], np.int64)
BOMBS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "ConstantOfShape": lambda proto: _before(proto, "ConstantOfShape", HUGE),
    "Expand": lambda proto: _before(proto, "Expand", np.array([1 << 24, 1, 1, 1, 1])),
    "Tile": lambda proto: _before(proto, "Tile", np.array([1, 1024, 1024, 64], np.int64)),
    "Pad": lambda proto: _before(proto, "Pad", np.array([0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20])),
    "Resize": lambda proto: _before(proto, "Resize", np.array([1, 3, 1 << 17, 1 << 17])),
    "Range": lambda proto: _before(proto, "Range", np.float32(0), np.float32(4e9), np.float32(1)),
    "input": lambda proto: setattr(
        proto.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 1 << 26
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_tensors_made_of_little_are_bounded(proto, bomb):
    BOMBS[bomb](proto)
    assert {finding.rule for finding in inspect(proto)} == {"huge-tensor"}


def test_each_reader_that_unpacks_a_constant_counts(proto):
    """A megabyte that six hundred nodes turn into floats is more than any float file holds."""
    proto.graph.initializer.extend([
        numpy_helper.from_array(np.zeros(1 << 20, np.int8), "codes"),
        numpy_helper.from_array(np.float32(1), "scale"),
    ])  # fmt: skip
    proto.graph.node.extend(
        helper.make_node("DequantizeLinear", ["codes", "scale"], [f"d{i}"]) for i in range(600)
    )
    assert {finding.rule for finding in inspect(proto)} == {"huge-tensor"}


def test_large_constants_are_not_computed_to_see_how_large_they_are(monkeypatch):
    """They would be folded, to be thrown away afterwards."""
    from onnx.reference.ops.op_constant_of_shape import ConstantOfShape

    from qdeploy.graph.io import to_ir

    made: list[object] = []
    monkeypatch.setattr(ConstantOfShape, "_run", lambda *given, **_: made.append(given))
    shape = numpy_helper.from_array(np.array([LARGEST_FOLDED_VALUES + 1], np.int64), "shape")
    node = helper.make_node("ConstantOfShape", ["shape"], ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [], [y], [shape])
    opsets = [helper.make_opsetid("", 21)]
    simplify(to_ir(helper.make_model(graph, opset_imports=opsets, ir_version=10)))
    assert made == []


@pytest.fixture
def chain() -> Callable[[int], onnx.ModelProto]:
    def build(length: int) -> onnx.ModelProto:
        proto = onnx.ModelProto.FromString(residual_net())
        first, image = proto.graph.node[0], proto.graph.input[0].name
        names = [image, *(f"r{i}" for i in range(length))]
        nodes = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
        first.input[0] = names[-1]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend([*nodes, *kept])
        return proto

    return build


def test_preparing_twice_the_nodes_is_at_most_twice_the_work(chain, monkeypatch):
    """Patterns tried and nodes passed over, counted: square work would be four times as much."""
    from onnx_ir._linked_list import DoublyLinkedSet

    work = {"steps": 0}
    tried, stepped = RewriteRule.try_rewrite, DoublyLinkedSet.__iter__

    def counting(self, *given, **options):
        work["steps"] += 1
        return tried(self, *given, **options)

    def iterating(self):
        for node in stepped(self):
            work["steps"] += 1
            yield node

    monkeypatch.setattr(RewriteRule, "try_rewrite", counting)
    monkeypatch.setattr(DoublyLinkedSet, "__iter__", iterating)
    steps = []
    for length in (200, 400, 800):
        work["steps"] = 0
        prepare(chain(length), opset=21, ir_version=10, where="chain")
        steps.append(work["steps"])
    assert steps[2] - steps[1] <= 2.6 * (steps[1] - steps[0])
