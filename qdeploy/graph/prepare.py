"""Bring any classifier graph into the form that quantizes well, without changing what it computes.

Opset and IR version pinned, constants lifted, BatchNorm folded, spatial means as pooling (which has
an int8 kernel), a dynamic batch, readable names, and nothing about the machine it was made on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import count

import numpy as np
import onnx
import onnx_ir as ir
from jaxtyping import Float32
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.rewriter.rules import common as rules

from qdeploy.errors import InputError, foreign_reader
from qdeploy.graph.io import PRODUCER, check_written, to_ir
from qdeploy.graph.opset import at_opset
from qdeploy.graph.simplify import indexed, simplify

WEIGHT_NAME = re.compile(r"(.+)\.weight(?:_\d+)?", re.DOTALL)  # numbered where names clashed
CONSTANT_NAMES = {1: "weight", 2: "bias"}
RULES = indexed(
    (
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.normalize_pad_format_conv_rule,
        rules.fuse_pad_into_conv_rule,
        rules.transpose_b_matmul_add_to_gemm_rule,
        rules.matmul_add_to_gemm_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
        rules.conv_affine_fusion_rule,
    )
)
OTHER_FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
TYPE_ATTRIBUTES = frozenset({"to", "dtype"})
NARROW = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
CLEANING = (
    common.IdentityEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedFunctionsPass(),
    common.RemoveUnusedOpsetsPass(),
    common.TopologicalSortPass(),
    common.ClearMetadataAndDocStringPass(),
)


def prepare(proto: onnx.ModelProto, *, opset: int, ir_version: int, where: str) -> ir.Model:
    """The same classifier, with the ends of `qdeploy.graph.ends`, ready to be quantized.

    Raises:
        InputError: it holds what has no meaning at inference, such as an active Dropout, or cannot
            be converted.
    """
    model = _read(proto, opset, where)
    return prepare_graph(model, ir_version=ir_version, where=where)


def prepare_graph(model: ir.Model, *, ir_version: int, where: str) -> ir.Model:
    """The same of a graph that is at its opset, in place.

    Raises:
        InputError: as `prepare`.
    """
    model.ir_version = ir_version
    _widen(model)
    _make_batch_dynamic(model)
    with foreign_reader(f"model {where}: cannot be prepared"):
        simplify(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        rewriter.rewrite(model, RULES)
    _refuse_dropout(model.graph, where)
    _fold_lone_batchnorms(model.graph)
    _means_to_pooling(model.graph)
    _plain_gemms(model.graph)
    with foreign_reader(f"model {where}: cannot be prepared"):
        for clean in CLEANING:
            clean(model)
    _rename(model.graph)
    _forget_origin(model)
    with foreign_reader(f"model {where}: cannot be prepared"):
        common.ShapeInferencePass()(model)
        check_written(model)
    return model


def interface(model: ir.Model) -> tuple[str, tuple[int, int, int], str, int]:
    """Input name, its channels, height and width, output name, number of classes."""
    (image,), logits = model.graph.inputs, model.graph.outputs[0]
    assert image.name and image.shape and logits.name and logits.shape  # noqa: S101, PT018
    channels, height, width = (int(size) for size in image.shape[1:])  # type: ignore[arg-type]
    return image.name, (channels, height, width), logits.name, int(logits.shape[1])  # type: ignore[arg-type]


def _read(proto: onnx.ModelProto, opset: int, where: str) -> ir.Model:
    """`proto` at exactly `opset`, by onnx's own converter."""
    have = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}.get("ai.onnx")
    with foreign_reader(
        f"model {where}: cannot be converted from opset {have} to {opset}",
        hint=f"export it again with opset {opset}",
    ):
        if have != opset:
            proto = at_opset(proto, opset)
        model = to_ir(proto)
        common.RemoveInitializersFromInputsPass()(model)
    return model


def is_narrow(proto: onnx.ModelProto) -> bool:
    """Whether some of it is computed in 16 bits."""
    return any(tensor.data_type in NARROW for tensor in proto.graph.initializer) or any(
        attribute.t.data_type in NARROW or (attribute.name == "to" and attribute.i in NARROW)
        for node in proto.graph.node
        for attribute in node.attribute
    )


def _widen(model: ir.Model) -> None:
    """Floats of other sizes become float32: constants, casts and what lies between them."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in OTHER_FLOATS:
            value.const_value = _as_float32(value.const_value)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        _widen_attributes(node)
        for value in node.outputs:
            if value.dtype in OTHER_FLOATS:
                value.dtype = ir.DataType.FLOAT


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in OTHER_FLOATS:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(tensor))
        elif name in TYPE_ATTRIBUTES and attribute.as_int() in OTHER_FLOATS:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _as_float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _make_batch_dynamic(model: ir.Model) -> None:
    """Replace a fixed batch by a symbol, also where it is baked into the graph.

    Whether that gave the same network is for whoever compares it with the one that came.
    """
    graph = model.graph
    image = graph.inputs[0]
    assert image.shape is not None  # noqa: S101
    fixed = image.shape[0]
    image.shape = ir.Shape(["batch", *image.shape[1:]])
    for output in graph.outputs:
        if output.shape is not None and len(output.shape):
            output.shape = ir.Shape(["batch", *output.shape[1:]])
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    if isinstance(fixed, int):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _free_baked_batch(graph, fixed)


def _free_baked_batch(graph: ir.Graph, batch: int) -> None:
    sizes: ir.Value | None = None  # the batch's, as a vector of one
    for node in list(graph):
        if node.op_type == "Reshape" and _constant(node.inputs[0]) is None:
            _free_reshape(graph, node, batch)
        elif node.op_type == "Concat" and node.attributes.get_int("axis", 0) != 0:
            for i, value in enumerate(node.inputs):
                constant = _constant(value)
                if constant is not None and constant.ndim and constant.shape[0] == batch == 1:
                    sizes = sizes or _batch_size(graph)
                    node.replace_input_with(i, _repeated(graph, node, value, constant, sizes))


def _batch_size(graph: ir.Graph) -> ir.Value:
    first = next(iter(graph))
    node = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
    node.outputs[0].name = f"{graph.inputs[0].name}_batch"
    graph.insert_before(first, node)
    return node.outputs[0]


def _repeated(
    graph: ir.Graph, before: ir.Node, value: ir.Value | None, constant: np.ndarray, sizes: ir.Value
) -> ir.Value:
    """A constant that was made for a batch of one, such as a class token, once for each image."""
    name = f"{value.name if value is not None else before.name}_repeated"
    rest = _new_constant(graph, f"{name}_shape", np.array(constant.shape[1:], np.int64))
    target = ir.node("Concat", [sizes, rest], {"axis": 0})
    expand = ir.node("Expand", [value, target.outputs[0]])
    target.outputs[0].name, expand.outputs[0].name = f"{name}_target", name
    graph.insert_before(before, [target, expand])
    return expand.outputs[0]


def _free_reshape(graph: ir.Graph, node: ir.Node, batch: int) -> None:
    """Let a Reshape whose first dimension is the fixed batch, or a part of it, take any batch."""
    shape = _constant(node.inputs[1])
    if shape is None or not shape.size or shape[0] <= 0 or shape[0] % batch:
        return
    free = shape.copy()
    if -1 not in shape[1:]:
        free[0] = -1
    elif shape[0] == batch:
        free[0] = 0
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    node.replace_input_with(1, _new_constant(graph, f"{node.outputs[0].name}_shape", free))


def _refuse_dropout(graph: ir.Graph, where: str) -> None:
    for node in graph:
        if node.op_type == "Dropout":
            raise InputError(
                f"model {where}: Dropout {node.name!r} is active (exported in training mode)",
                hint="export again after model.eval()",
            )


def _fold_lone_batchnorms(graph: ir.Graph) -> None:
    """A BatchNorm that no convolution precedes becomes a depthwise 1x1 convolution.

    Its one weight per channel lies exactly on any symmetric per-channel grid.
    """
    for node in list(graph):
        if node.op_type != "BatchNormalization":
            continue
        folded = folded_batchnorm(node)
        if folded is None or _rank(node.inputs[0]) not in {None, 4}:
            continue
        weight, bias = folded
        name = _stem(node.inputs[1].name if node.inputs[1] else None) or node.outputs[0].name
        conv = ir.node(
            "Conv",
            [
                node.inputs[0],
                _new_constant(graph, f"{name}.weight", weight[:, None, None, None]),
                _new_constant(graph, f"{name}.bias", bias),
            ],
            {"group": len(weight), "kernel_shape": [1, 1]},
        )
        _replace(graph, node, conv)


def folded_batchnorm(
    node: ir.Node,
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]] | None:
    """What a BatchNormalization multiplies each channel by and adds; None if that is computed."""
    constants = [_constant(value) for value in node.inputs[1:]]
    if any(c is None for c in constants):
        return None
    scale, shift, mean, variance = (np.asarray(c, np.float64) for c in constants)
    weight = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return weight.astype(np.float32), (shift - mean * weight).astype(np.float32)


def _means_to_pooling(graph: ir.Graph) -> None:
    """ReduceMean over height and width becomes GlobalAveragePool, flattened if it drops them."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or _rank(node.inputs[0]) != 4 or len(node.inputs) < 2:
            continue
        axes = _constant(node.inputs[1])
        if axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        pool = ir.node("GlobalAveragePool", [node.inputs[0]])
        if node.attributes.get_int("keepdims", 1):
            _replace(graph, node, pool)
        else:
            graph.insert_before(node, pool)
            _replace(graph, node, ir.node("Flatten", [pool.outputs[0]], {"axis": 1}))


def _plain_gemms(graph: ir.Graph) -> None:
    """Alpha, beta and a bias of another shape go into the constants of a Gemm."""
    for node in graph:
        if node.op_type != "Gemm" or (weight := _constant(node.inputs[1])) is None:
            continue
        alpha = node.attributes.get_float("alpha", 1.0)
        if alpha != 1:
            _set_constant(graph, node, 1, weight * np.float32(alpha))
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
        bias = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
        channels = weight.shape[0 if node.attributes.get_int("transB", 0) == 1 else 1]
        if bias is None or bias.size not in {1, channels}:
            continue
        beta = node.attributes.get_float("beta", 1.0)
        flat = np.broadcast_to(bias.reshape(-1) * np.float32(beta), (channels,))
        if beta != 1 or bias.shape != flat.shape:
            _set_constant(graph, node, 2, flat)
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def _rename(graph: ir.Graph) -> None:
    """Name each node after its weight, or after its operator; tensors and constants after nodes."""
    taken: set[str] = set()
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: count(1))
    renamed: set[ir.Value] = set()
    stems = {value: value.name for value in graph.initializers.values()}
    for i, constant in enumerate(stems):  # so that no name that is to be given is there already
        constant.name = f"{constant.name}#{i}"
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}  # which keep their names
    for node in graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        stem = _stem(stems.get(weight)) if weight is not None else None
        counter = numbers[stem or node.op_type]
        node.name = next(n for n in _candidates(stem, node, counter) if n not in taken)
        taken.add(node.name)
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = _apart(f"{node.name}:{i or 'out'}", ends)
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value not in renamed:
                value.name = _apart(f"{node.name}.{CONSTANT_NAMES.get(i, f'input{i}')}", ends)
                renamed.add(value)


def _apart(name: str, ends: AbstractSet[str | None]) -> str:
    """The name, unless an input or output of the graph has it already."""
    return next(n for n in _numbered(name) if n not in ends)


def _candidates(stem: str | None, node: ir.Node, numbers: Iterator[int]) -> Iterator[str]:
    """Names to try: numbers go on where they stopped, so that names are given in linear time."""
    if stem is not None:
        yield stem
    yield from (f"{stem or node.op_type}_{i}" for i in numbers)


def _stem(name: str | None) -> str | None:
    """`layer1.0.conv1` for `layer1.0.conv1.weight`; None for names that say nothing."""
    match = WEIGHT_NAME.fullmatch(name or "")
    return re.sub(r"[^\w.\-]", "_", match[1]) if match else None


def _forget_origin(model: ir.Model) -> None:
    model.producer_name, model.producer_version = PRODUCER, None
    model.domain, model.model_version, model.doc_string = None, None, None
    model.metadata_props.clear()
    model.graph.name = "classifier"
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.doc_string = None
        value.metadata_props.clear()


def _replace(graph: ir.Graph, node: ir.Node, replacement: ir.Node) -> None:
    graph.insert_before(node, replacement)
    old, new = node.outputs[0], replacement.outputs[0]
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def _new_constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    taken = graph.initializers
    unique = next(n for n in _numbered(name) if n not in taken)
    value = ir.val(unique, const_value=ir.tensor(np.ascontiguousarray(values), name=unique))
    graph.register_initializer(value)
    return value


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{i}" for i in count(1))


def _set_constant(graph: ir.Graph, node: ir.Node, index: int, values: np.ndarray) -> None:
    """Give one input of a node a constant of its own."""
    old = node.inputs[index]
    name = old.name if old is not None and old.name else f"{node.outputs[0].name}.{index}"
    node.replace_input_with(index, _new_constant(graph, name, values.astype(np.float32)))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
