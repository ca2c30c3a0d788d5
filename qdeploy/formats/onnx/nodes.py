"""What a graph's operators could do that a classifier's need not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import onnx

from qdeploy.formats.onnx.fused_operators import is_fused
from qdeploy.formats.onnx.integer_operators import MICROSOFT, OPERATORS
from qdeploy.formats.onnx.tensors import all_nodes, attached, values
from qdeploy.messages.encoded import decode
from qdeploy.values import STANDARD_DOMAINS, Finding

RULES = {
    "custom-operator": "A node runs an operator that is not in the ONNX standard.",
    "runtime-operator": "A node is of an operator of onnxruntime's own, whose meaning is known.",
    "shadowed-operator": "A local function replaces an operator of the standard.",
    "control-flow": "A node holds a graph of its own, which runs or does not.",
    "randomness": "A node draws random numbers, so the model has no answer of its own.",
    "data-dependent-choice": "The model chooses by comparing what it sees: what backdoors"
    " built into an architecture are made of.",
}
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
    "Multinomial",
})  # fmt: skip
CHOICES: Mapping[str, tuple[int, ...]] = {  # operands whose values decide
    "Where": (0,), "Compress": (0, 1), "Cast": (0,), "NonZero": (0,), "Unique": (0,),
    "Equal": (0, 1), "Greater": (0, 1), "GreaterOrEqual": (0, 1), "Less": (0, 1),
    "LessOrEqual": (0, 1), "IsNaN": (0,), "IsInf": (0,), "TopK": (0,), "ArgMax": (0,),
    "ArgMin": (0,), "Gather": (1,), "GatherElements": (1,), "GatherND": (1,),
    "ScatterElements": (1,), "ScatterND": (1,),
}  # fmt: skip
SHAPE_ONLY = frozenset({"Shape", "Size"})  # their outputs do not depend on their input's values
Step = tuple[Iterable[str], Iterable[str]]  # from names to names


def place(node: onnx.NodeProto) -> str:
    """A name to find the node by."""
    return node.name or next((name for name in node.output if name), node.op_type)


def foreign_operators(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Operators that are neither standard nor functions of the model."""
    local = {(f.domain, f.name) for f in proto.functions}
    for domain, name in sorted(local):
        if domain in STANDARD_DOMAINS:
            text = f"local function {name!r} replaces an operator of the ONNX standard"
            yield Finding("shadowed-operator", "error", name, text)
    for node in all_nodes(proto):
        if node.domain in STANDARD_DOMAINS or (node.domain, node.op_type) in local:
            continue
        text = f"operator {node.domain}.{node.op_type} is not a standard ONNX operator"
        if node.domain == MICROSOFT:
            text += "; onnxruntime has it, other runtimes do not"
        known = (node.domain, node.op_type) in OPERATORS or is_fused(node.domain, node.op_type)
        if known:
            yield Finding("runtime-operator", "warning", place(node), text)
        else:
            yield Finding("custom-operator", "error", place(node), text)


def control_flow(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Nodes that hold graphs."""
    for node in all_nodes(proto):
        if node.op_type in CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
            text = f"control flow ({node.op_type}) is not supported"
            yield Finding("control-flow", "error", place(node), text)


def randomness(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Nodes that answer differently each time."""
    constants = constant_tensors(proto)
    for node in all_nodes(proto):
        if node.op_type in RANDOM or _drops_out(node, constants):
            text = f"{node.op_type} draws random numbers"
            yield Finding("randomness", "error", place(node), text)


def _drops_out(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a Dropout is, or may become, one of training."""
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return False
    tensor = constants.get(node.input[2])
    training = None if tensor is None else values(tensor)
    return training is None or bool(training.any())


def constant_tensors(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and the tensors of Constant nodes, by the name they are read by."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        tensor = next(attached(node), None)
        if node.op_type == "Constant" and tensor is not None and node.output:
            found[node.output[0]] = tensor
    return found


def choices(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Nodes between an input and an output that decide by the values of the input.

    What depends on the input's shape alone does not count, nor what compares constants. Inside
    of a local function every argument counts as an input.
    """
    graph = proto.graph
    constant = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constant]
    yield from _choices(graph.node, inputs, [value.name for value in graph.output])
    for function in proto.functions:
        yield from _choices(function.node, function.input, function.output)


def _choices(
    nodes: Iterable[onnx.NodeProto], inputs: Iterable[str], outputs: Iterable[str]
) -> Iterator[Finding]:
    nodes = list(nodes)
    seen = _reached(
        inputs,
        ((node.input, node.output) for node in nodes if node.op_type not in SHAPE_ONLY),
    )
    used = _reached(outputs, ((node.output, node.input) for node in nodes))
    for node in nodes:
        decisive = [node.input[i] for i in CHOICES.get(node.op_type, ()) if i < len(node.input)]
        if not seen.isdisjoint(decisive) and not used.isdisjoint(node.output) and _decides(node):
            text = f"{node.op_type} {place(node)!r} decides by values that come from the input"
            yield Finding("data-dependent-choice", "warning", place(node), text)


def _decides(node: onnx.NodeProto) -> bool:
    """Of the casts only those to boolean do."""
    if node.op_type != "Cast":
        return True
    return any(a.name == "to" and a.i == onnx.TensorProto.BOOL for a in node.attribute)


def _reached(start: Iterable[str], steps: Iterable[Step]) -> set[str]:
    """Every name that can be reached, in whatever order the nodes stand."""
    steps = list(steps)
    behind = defaultdict(list)
    for index, (sources, _) in enumerate(steps):
        for source in sources:
            behind[source].append(index)
    found, waiting, taken = {"", *start}, list(start), set()
    while waiting:
        for index in behind.pop(waiting.pop(), ()):
            if index not in taken:
                taken.add(index)
                new = set(steps[index][1]) - found
                found |= new
                waiting.extend(new)
    return found - {""}


def operators(data: bytes) -> tuple[str, ...]:
    """The operator of each node of a well-formed model; those outside of the standard in full."""
    return tuple(
        node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
        for node in decode(data).graph.node
    )
