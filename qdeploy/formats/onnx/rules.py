"""What an ONNX message claims, holds or asks for that an image classifier has no business with.

Nothing is run. Each rule is a function from the message to findings, and has one place; the
loaders refuse what is an error here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import onnx

from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats.onnx import batch_axis, codes, external, limits, nodes, tensors
from qdeploy.formats.onnx.fused_operators import standard
from qdeploy.messages.encoded import BLOCK, is_large, message_of
from qdeploy.messages.parts import find
from qdeploy.values import Finding

LARGEST_TEXT_BYTES = 1 << 16
FIRST_WITH_CONSTANTS = 4  # version of the format; in those before, all constants are inputs
RULES = {
    **tensors.RULES,
    **external.RULES,
    **nodes.RULES,
    **codes.RULES,
    **limits.RULES,
    **batch_axis.RULES,
    "sparse-initializer": "The model holds sparse tensors.",
    "duplicate-initializer": "Several constant tensors have one name, so readers may differ.",
    "training-info": "The model brings instructions for training.",
    "invalid-onnx": "The model fails ONNX's own check.",
    "unused-initializer": "A constant tensor is read by nothing: bytes that only travel along.",
    "overridable-initializer": "A constant tensor is an input too: callers can replace it.",
    "large-metadata": "A text in the file is far longer than texts about a model are.",
    "unprintable-name": "A name holds characters that do not print.",
    "several-inputs": "The model takes more than one input.",
    "several-outputs": "The model gives more than one output.",
}


def inspect(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Everything that is odd about a model, errors first.

    A graph that is too large is looked at no further. External data is looked at by
    `external.external_data`. Tensors whose data was not loaded are
    left out here.
    """
    beyond = list(limits.limits(proto))
    yield from beyond
    if beyond:
        return
    yield from _errors(proto)
    yield from (f for f in nodes.foreign_operators(proto) if f.level != "error")
    yield from tensors.half_precision(proto)
    yield from tensors.odd_tensors(proto)
    yield from codes.integer_weights(proto)
    yield from nodes.choices(proto)
    yield from (finding for finding in batch_axis.batch_axis(proto) if finding.level != "error")
    yield from _initializers(proto)
    yield from _texts(proto)
    yield from _ends(proto)


def errors(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What no classifier has any business with.

    Whether there is too much of anything comes first: whoever goes on then spends the time.
    """
    yield from limits.limits(proto)
    yield from _errors(proto)


def _errors(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What the operators ask for comes only if all else is well."""
    found = False
    foreign = (f for f in nodes.foreign_operators(proto) if f.level == "error")
    for finding in chain(
        tensors.false_claims(proto), _structure(proto), foreign, nodes.control_flow(proto),
        nodes.randomness(proto), tensors.not_finite(proto), codes.bad_scales(proto),
    ):  # fmt: skip
        found = True
        yield finding
    if not found:
        yield from _errors_of_operators(proto)


def _errors_of_operators(proto: onnx.ModelProto) -> Iterator[Finding]:
    """By those of the standard that onnxruntime's own stand for; each rule if those before hold."""
    try:
        plain = standard(proto, "it cannot be known what it computes")
    except InputError as error:
        yield Finding("custom-operator", "error", "", str(error))
        return
    external = any(map(tensors.is_external, tensors.all_tensors(proto)))
    found = list(limits.limits(plain)) if plain is not proto else []
    if not found and not external:
        found = list(_own_check(plain))
    if not found:
        found = [f for f in batch_axis.batch_axis(plain) if f.level == "error"]
    yield from found


def _own_check(proto: onnx.ModelProto) -> Iterator[Finding]:
    try:
        with foreign_reader("fails ONNX's own check"):
            if is_large(proto):
                _check_as_files(proto)
            else:
                onnx.checker.check_model(proto, full_check=True)
    except InputError as error:
        yield Finding("invalid-onnx", "error", "", str(error))


def _check_as_files(proto: onnx.ModelProto) -> None:
    """The same of a model that is too large for a message: of its tensors only the claims."""
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "model.onnx"
        (message.parent / BLOCK).touch()  # its content is nothing that the check looks at
        message.write_bytes(message_of(proto))
        onnx.checker.check_model(message, full_check=True)


def _structure(proto: onnx.ModelProto) -> Iterator[Finding]:
    graph = proto.graph
    if next(find(proto, onnx.SparseTensorProto), None) is not None:
        yield Finding("sparse-initializer", "error", "", "sparse tensors are not supported")
    for name, count in Counter(tensor.name for tensor in graph.initializer).items():
        if count > 1:
            text = f"{count} constant tensors are called {name!r}"
            yield Finding("duplicate-initializer", "error", name, text)
    if proto.training_info:
        yield Finding("training-info", "error", "", "brings instructions for training")


def _initializers(proto: onnx.ModelProto) -> Iterator[Finding]:
    graph = proto.graph
    read = {name for node in graph.node for name in node.input}
    read.update(value.name for value in graph.output)
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        name = tensor.name
        if name not in read:
            text = f"tensor {name!r} is read by nothing and holds {tensor.ByteSize()} bytes"
            yield Finding("unused-initializer", "warning", name, text)
        if name in inputs and proto.ir_version >= FIRST_WITH_CONSTANTS:
            text = f"tensor {name!r} is an input too, so whoever runs the model can replace it"
            yield Finding("overridable-initializer", "warning", name, text)
    if graph.initializer and proto.ir_version < FIRST_WITH_CONSTANTS:
        text = f"IR version {proto.ir_version}, in which callers can replace every constant tensor"
        yield Finding("overridable-initializer", "note", "", text)


def _texts(proto: onnx.ModelProto) -> Iterator[Finding]:
    for where, text in _written(proto):
        size = len(text.encode("utf-8", "replace"))
        if size > LARGEST_TEXT_BYTES:
            complaint = f"text {where!r} has {size} bytes"
            yield Finding("large-metadata", "warning", where, complaint)
    names = (tensor.name for tensor in proto.graph.initializer)
    ends = (value.name for value in (*proto.graph.input, *proto.graph.output))
    for name in dict.fromkeys(chain(names, ends, map(nodes.place, tensors.all_nodes(proto)))):
        if not name.isprintable():
            complaint = f"name {name!r} holds characters that do not print"
            yield Finding("unprintable-name", "warning", name, complaint)


def _written(proto: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Every free text of the file, and where it is."""
    graph = proto.graph
    named: Iterable[tuple[str, Any]] = chain(
        [("model", proto), ("graph", graph)],
        ((f.name, f) for f in proto.functions),
        ((nodes.place(node), node) for node in tensors.all_nodes(proto)),
        ((tensor.name, tensor) for tensor in graph.initializer),
        ((value.name, value) for value in _values(graph)),
    )
    for name, item in named:
        yield f"{name}: doc_string", item.doc_string
        for entry in item.metadata_props:
            yield f"{name}: {entry.key}", entry.key + entry.value


def _values(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    return chain(graph.input, graph.output, graph.value_info)


def _ends(proto: onnx.ModelProto) -> Iterator[Finding]:
    """The inputs that a caller has to give, and the outputs."""
    constant = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value.name for value in proto.graph.input if value.name not in constant]
    outputs = [value.name for value in proto.graph.output]
    for rule, names in (("several-inputs", inputs), ("several-outputs", outputs)):
        if len(names) > 1:
            what = rule.removeprefix("several-")
            text = f"the model has {len(names)} {what}: {', '.join(map(repr, names[:5]))}"
            yield Finding(rule, "warning", names[1], text)
