"""A file that runs in integers, turned back into the float graph that it stands for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import onnx_ir as ir
from jaxtyping import Float32

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.onnx.integer_operators import PAIR
from qdeploy.formats.onnx.reading import QUANTIZATION_OPS
from qdeploy.formats.onnx.standard import in_standard_operators
from qdeploy.formats.onnx.tensors import constant
from qdeploy.graph.io import parse, serialize
from qdeploy.graph.prepare import folded_batchnorm, prepare, prepare_graph
from qdeploy.graph.sites import WEIGHTED
from qdeploy.provenance.clips import RANGE_OP, Range, nonnegative, range_mark
from qdeploy.provenance.stored import StoredGrid, StoredTensor, read_grid
from qdeploy.values import STANDARD_DOMAINS

STORED_NAME = re.compile(r"(.+?)[._](?:quantized|quant|q)", re.DOTALL)  # ours, and the runtime's


@dataclass(frozen=True, slots=True, eq=False)
class Unquantized:
    """The float twin of a quantized file, in the prepared form, and the integers it came from."""

    twin: ir.Model
    tensors: tuple[StoredTensor, ...]
    norms: tuple[RoundedNorm, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RoundedNorm:
    """A BatchNormalization whose constants the file holds as integers, as a factor per channel."""

    weight: Float32[np.ndarray, " channels"]
    weight_reach: Float32[np.ndarray, " channels"]  # how far rounding to nearest can move it
    bias_reach: Float32[np.ndarray, " channels"]


def unquantize(data: bytes, *, opset: int, ir_version: int, where: str) -> Unquantized:
    """The float graph of a file of QuantizeLinear and DequantizeLinear, of any maker.

    Integer constants become floats. Pairs on activations go away, except that a range which starts
    at 0 leaves a mark where it cuts negative values: quantizers drop the Relu in front of it.

    Raises:
        InputError: the file fails the check of untrusted ones, runs other quantized operators, or
            uses the pair in a way that leaves no float graph.
    """
    model = in_standard_operators(data, where)
    graph = model.graph
    for node in graph:
        _refuse_other(node, where)
    readers = [node for node in graph if node.op_type == "DequantizeLinear"]
    taken = {value.name for node in graph for value in node.outputs}
    taken.update(graph.initializers, (value.name for value in graph.inputs))
    stored = [
        (node.outputs[0].consumers(), _to_floats(graph, node, taken, where))
        for node in readers if _stored_value(node) is not None
    ]  # fmt: skip
    tensors = tuple(tensor for _, tensor in stored)
    varying = _varying(graph)
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _bypass(graph, node, varying, where)
    _drop_idle_marks(graph)
    with foreign_reader(f"model {where}: a BatchNormalization's constants do not fit each other"):
        norms = tuple(_norms(graph, stored))
    _name_constants(graph)
    for domain in set(graph.opset_imports) - STANDARD_DOMAINS:
        del graph.opset_imports[domain]
    if graph.opset_imports.get("") == opset:
        twin = prepare_graph(parse(serialize(model)), ir_version=ir_version, where=where)
    else:
        proto = ir.serde.serialize_model(model)
        twin = prepare(proto, opset=opset, ir_version=ir_version, where=where)
    return Unquantized(twin, tensors, norms)


def _norms(
    graph: ir.Graph, stored: Iterable[tuple[Iterable[ir.Node], StoredTensor]]
) -> Iterator[RoundedNorm]:
    """What rounding scale and shift on grids of their own can do to a BatchNormalization."""
    rounded: set[ir.Node] = set()
    half_steps: dict[str, np.ndarray] = {}
    for readers, found in stored:
        norms = [node for node in readers if node.op_type == "BatchNormalization"]
        if not norms:
            continue
        rounded.update(norms)
        step = np.abs(found.grid.spread(found.grid.scale, found.held.shape))
        half_steps[hashlib.sha256(found.values.tobytes()).hexdigest()] = step / 2
    for node in graph:
        folded = folded_batchnorm(node) if node in rounded else None
        if folded is None:
            continue
        scale, shift, mean, variance = (constant(value) for value in node.inputs[1:])
        assert scale is not None and shift is not None  # noqa: S101, PT018 - it was folded
        assert mean is not None and variance is not None  # noqa: S101, PT018
        none = np.zeros(scale.shape, np.float32)
        reach = [
            half_steps.get(hashlib.sha256(c.tobytes()).hexdigest(), none) for c in (scale, shift)
        ]
        spread = np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        weight_reach = (reach[0] / spread).astype(np.float32)
        bias_reach = (reach[1] + np.abs(mean) * weight_reach).astype(np.float32)
        yield RoundedNorm(folded[0], weight_reach, bias_reach)


def _refuse_other(node: ir.Node, where: str) -> None:
    """Only operators that a float model could hold, and pairs that undo each other."""
    foreign = node.domain not in STANDARD_DOMAINS or node.op_type == RANGE_OP
    if foreign or node.op_type in QUANTIZATION_OPS - PAIR:
        raise InputError(
            f"model {where}: holds {node.op_type}; only float operators between QuantizeLinear "
            "and DequantizeLinear can be compared with a float model"
        )
    if node.op_type == "DequantizeLinear" and _stored_value(node) is None:
        maker = _producer(node.inputs[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            raise InputError(
                f"model {where}: DequantizeLinear {node.name!r} reads integers that no "
                "QuantizeLinear made"
            )
    if node.op_type == "QuantizeLinear":
        for reader in node.outputs[0].consumers():
            if reader.op_type != "DequantizeLinear":
                raise InputError(
                    f"model {where}: {reader.op_type} {reader.name!r} computes on integers; only "
                    "float operators can be compared with a float model"
                )


def _stored_value(node: ir.Node) -> ir.Value | None:
    """The constant a DequantizeLinear reads, perhaps through a QuantizeLinear; None if none."""
    maker = _producer(node.inputs[0])
    value = (
        maker.inputs[0]
        if maker is not None and maker.op_type == "QuantizeLinear"
        else node.inputs[0]
    )
    return value if constant(value) is not None else None


def _to_floats(graph: ir.Graph, node: ir.Node, taken: set[str | None], where: str) -> StoredTensor:
    """Put a float constant in the place of a DequantizeLinear, under a name not yet `taken`."""
    value, rounding, grid = _stored_value(node), _producer(node.inputs[0]), read_grid(node, where)
    held = constant(value)
    assert value is not None and value.name is not None and held is not None  # noqa: S101, PT018
    if rounding is not None:
        _check_pair(rounding, node, grid, where)
    with foreign_reader(f"model {where}: the scales of {value.name!r} do not fit it"):
        codes = grid.nearest(held) if rounding is not None else held
        tensor = StoredTensor(value.name, codes, grid, rounding is not None)
        floats = tensor.values
    match = STORED_NAME.fullmatch(value.name)
    name = _free_name(taken, match[1] if match else value.name)
    new = ir.val(name, const_value=ir.tensor(floats, name=name))
    graph.register_initializer(new)
    node.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    taken.discard(node.outputs[0].name)
    return tensor


def _varying(graph: ir.Graph) -> frozenset[ir.Value]:
    """Tensors that nodes compute from the image."""
    found: set[ir.Value] = set(graph.inputs)
    for node in graph:
        if found.intersection(v for v in node.inputs if v is not None):
            found.update(node.outputs)
    return frozenset(found.difference(graph.inputs))


def _bypass(graph: ir.Graph, quantize: ir.Node, varying: frozenset[ir.Value], where: str) -> None:
    """Take a QuantizeLinear and its DequantizeLinears away, or leave a mark of what they cut."""
    value, grid = quantize.inputs[0], read_grid(quantize, where)
    assert value is not None  # noqa: S101
    if np.any(grid.scale < 0):
        raise InputError(f"model {where}: QuantizeLinear {quantize.name!r}: a scale is negative")
    from_zero = bool(np.all(grid.zero_point == grid.least))
    if from_zero and value in varying:
        steps = grid.most - grid.least
        step = float(grid.scale.max())
        mark = range_mark(value, Range(steps * step, step))
        graph.insert_before(quantize, mark)
        value = mark.outputs[0]
    for node in dict.fromkeys(quantize.outputs[0].consumers()):
        _check_pair(quantize, node, grid, where)
        _replace(graph, node, value)
    graph.remove(quantize, safe=True)


def _check_pair(quantize: ir.Node, dequantize: ir.Node, grid: StoredGrid, where: str) -> None:
    """What is divided by a scale must be multiplied by the same.

    Raises:
        InputError: it is not, so that the pair multiplies, shifts or reads codes as others.
    """
    pair = read_grid(quantize, where), read_grid(dequantize, where)
    if not pair[0].same_as(pair[1]) or not pair[0].same_as(grid):
        raise InputError(
            f"model {where}: QuantizeLinear {quantize.name!r} and DequantizeLinear "
            f"{dequantize.name!r} have different scales or zero points, so that they do not undo "
            "each other"
        )


def _drop_idle_marks(graph: ir.Graph) -> None:
    """Remove marks behind tensors without negative values: there is nothing that they cut."""
    positive = nonnegative(graph)
    for node in list(graph):
        if node.op_type == RANGE_OP and node.inputs[0] in positive:
            assert node.inputs[0] is not None  # noqa: S101
            _replace(graph, node, node.inputs[0])


def _name_constants(graph: ir.Graph) -> None:
    """Keep the names of weights only: others may be in the way of those that preparing gives."""
    weights = {node.inputs[1] for node in graph if node.op_type in WEIGHTED}
    constants = list(graph.initializers.values())
    names = [value.name or "" for value in constants]
    for i, value in enumerate(constants):
        value.name = f":{i}"
    for i, (value, name) in enumerate(zip(constants, names, strict=True)):
        if value in weights:
            value.name = name if name.endswith(".weight") else f"file_{i}.weight"


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let the readers of `node` read `value`; an output of the graph keeps its name."""
    old = node.outputs[0]
    if old.is_graph_output():
        name, shape, kind = old.name, old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name = f"{name}:unread"
        value.name, value.shape, value.type = name, shape, kind
    else:
        old.replace_all_uses_with(value)
    graph.remove(node, safe=True)


def _free_name(taken: set[str | None], wanted: str) -> str:
    name = next(n for n in chain((wanted,), (f"{wanted}_{i}" for i in count(1))) if n not in taken)
    taken.add(name)
    return name


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
