"""The ends of a stranger's classifier, brought into one form by nodes in front and behind.

Everything in this program works on a graph that takes float32 (batch, channels, height, width) and
gives float32 (batch, classes). Files of others take images channels-last, flat, in uint8 or in 16
bits, leave height and width open, and give one logit, (batch, classes, 1, 1), or several tensors.
What lies between their ends is not touched; a file that is in that form already stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qdeploy.errors import InputError, UsageError, foreign_reader
from qdeploy.graph.image_shape import Shape, Sizes, image_shape, likely_layout
from qdeploy.graph.io import to_ir
from qdeploy.messages.encoded import decode, encode
from qdeploy.settings.card import Layout
from qdeploy.values import LARGEST_INPUT_VALUES, Stated

FLOAT = ir.DataType.FLOAT
FLOATS = frozenset({FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16})
PIXELS = frozenset({
    ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16, ir.DataType.INT32,
    ir.DataType.INT64,
})  # fmt: skip
PIXEL_RANGE = (0.0, 255.0)
SIGMOIDS = frozenset({"Sigmoid", "HardSigmoid", "QLinearSigmoid"})
# Through these an output is still the Sigmoid that was computed before them.
TRANSPARENT = frozenset({
    "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "QuantizeLinear",
    "DequantizeLinear",
})  # fmt: skip
OUTPUT_HINT = "name it: --output NAME, or [model] output in a model card"


def as_classifier(proto: onnx.ModelProto, stated: Stated, *, where: str) -> onnx.ModelProto:
    """The model with the ends that everything here works on; `proto` itself if it has them.

    The first output is the classes'; others that the model has stay behind it. One output is made
    two classes: `(0, logit)`, or `(1 - p, p)` if it comes out of a Sigmoid.

    Raises:
        InputError: it is no classifier of images, or not of the images that are stated; the hint
            says what can be done.
        UsageError: something must be stated, or is stated of another model.
    """
    with foreign_reader(f"model {where}: its ends cannot be read"):
        model = to_ir(proto)
        common.RemoveInitializersFromInputsPass()(model)
        if model.functions:
            common.InlinePass()(model)
    ends = _Ends(model.graph, f"model {where}")
    changes = [bool(proto.functions), ends.choose_output(stated), ends.mend_input(stated)]
    if ends.output_is_open:
        with foreign_reader(f"model {where}: its shapes cannot be inferred"):
            common.ShapeInferencePass()(model)
    changes.append(ends.mend_output())
    return ir.to_proto(model) if any(changes) else proto


def as_classifier_bytes(data: bytes, stated: Stated, *, where: str) -> bytes:
    """The same of a file that is to be judged; `data` itself if nothing is to be done."""
    proto = decode(data)
    if len(proto.graph.output) == 1:  # what is stated is stated of its float model
        stated = replace(stated, output=None)
    found = as_classifier(proto, stated, where=where)
    return data if found is proto else encode(found)


class _Ends:
    """The input and the first output of a graph, which is changed in place."""

    def __init__(self, graph: ir.Graph, where: str) -> None:
        self.graph = graph
        self.where = where

    @property
    def output_is_open(self) -> bool:
        """Whether the file does not say how many classes there are, or how they lie."""
        sizes = _sizes(self.graph.outputs[0])
        return len(sizes) != 2 or sizes[1] is None

    def choose_output(self, stated: Stated) -> bool:
        """Put the output of the classes first; whether that changes anything."""
        names = [value.name for value in self.graph.outputs]
        shown = ", ".join(map(repr, names))
        if not names:
            raise InputError(f"{self.where}: has no output")
        if stated.output is None:
            if len(names) == 1:
                return False
            raise UsageError(
                f"{self.where}: has {len(names)} outputs ({shown}); one of them is the classes'",
                hint=OUTPUT_HINT,
            )
        if stated.output not in names:
            raise UsageError(f"{self.where}: has no output {stated.output!r}; it has {shown}")
        order = sorted(self.graph.outputs, key=lambda value: value.name != stated.output)
        changed = order != list(self.graph.outputs)
        self.graph.outputs[:] = order
        return changed

    def mend_input(self, stated: Stated) -> bool:
        """Let it take float32 (batch, channels, height, width); whether that changes anything."""
        image = self.image()
        sizes = _sizes(image)
        shape, layout = image_shape(sizes, stated, f"{self.where}: input {image.name!r}")
        if math.prod(shape) * (sizes[0] or 1) > LARGEST_INPUT_VALUES:
            raise InputError(
                f"{self.where}: takes inputs of shape {_shown(image)}, which are no images"
            )
        if image.dtype in PIXELS:
            _require_pixels(image, stated, self.where)
        steps = list(self._steps_in(image, len(sizes), shape, layout))
        batch = _batch(image)
        if not steps:
            known = image.shape is not None and list(image.shape) == [batch, *shape]
            image.shape = ir.Shape([batch, *shape])
            return not known
        name = image.name
        taken = ir.val(name, dtype=FLOAT, shape=ir.Shape([batch, *shape]))
        image.name = self._fresh(f"{name}_given")
        last, nodes = self._chain(taken, steps, f"{name}_given")
        last.type, last.shape = image.type, image.shape
        image.replace_all_uses_with(last)
        self.graph.inputs[self.graph.inputs.index(image)] = taken
        first = next(iter(self.graph), None)
        if first is not None:
            self.graph.insert_before(first, nodes)
        return True

    def mend_output(self) -> bool:
        """Let it give float32 (batch, classes), two at least; whether that changes anything."""
        logits = self.graph.outputs[0]
        sizes = _sizes(logits)
        classes = self._classes(logits, sizes)
        if len(sizes) == 2 and classes > 1 and logits.dtype == FLOAT:
            return False
        name, probability = logits.name, _is_probability(logits)
        logits.name = self._fresh(f"{name}_as_given")
        score, nodes = self._chain(logits, list(self._steps_out(logits, sizes)), f"{name}_score")
        if classes == 1:
            score, more = self._two_classes(score, f"{name}", probability=probability)
            nodes = [*nodes, *more]
        batch = _batch(logits)
        score.name, score.dtype = name, FLOAT
        score.shape = ir.Shape([batch, max(classes, 2)])
        self.graph.extend(nodes)
        self.graph.outputs[0] = score
        return True

    def image(self) -> ir.Value:
        inputs = self.graph.inputs
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs)
            raise InputError(
                f"{self.where}: has {len(inputs)} inputs ({names}); a classifier of images has one"
            )
        if inputs[0].dtype not in FLOATS | PIXELS:
            raise InputError(
                f"{self.where}: input {inputs[0].name!r} takes {_type(inputs[0])}, which are no"
                " images"
            )
        return inputs[0]

    def _steps_in(
        self, image: ir.Value, rank: int, shape: Shape, layout: Layout
    ) -> Iterator[tuple[str, Mapping[str, Any], list[ir.Value]]]:
        """From float32 (batch, channels, height, width) to what the file takes."""
        if image.dtype != FLOAT:
            yield "Cast", {"to": image.dtype}, []
        if layout == "channels-last":
            yield "Transpose", {"perm": [0, 2, 3, 1]}, []
        elif rank == 2:
            yield "Flatten", {"axis": 1}, []
        elif rank == 3:
            yield "Reshape", {}, [self._constant(f"{image.name}_shape", np.array([0, *shape[1:]]))]

    def _steps_out(
        self, logits: ir.Value, sizes: Sizes
    ) -> Iterator[tuple[str, Mapping[str, Any], list[ir.Value]]]:
        """From what the file gives to float32 (batch, classes)."""
        if logits.dtype != FLOAT:
            yield "Cast", {"to": FLOAT}, []
        if len(sizes) == 1:
            yield "Reshape", {}, [self._constant(f"{logits.name}_shape", np.array([-1, 1]))]
        elif len(sizes) > 2:
            yield "Flatten", {"axis": 1}, []

    def _classes(self, logits: ir.Value, sizes: Sizes) -> int:
        what = f"{self.where}: output {logits.name!r}"
        if logits.dtype not in FLOATS:
            raise InputError(
                f"{what} gives {_type(logits)}, not a score for each class",
                hint="give the file that ends with the scores",
            )
        found = [size for size in sizes[1:] if size != 1]
        if not sizes or len(found) > 1 or None in found:
            raise InputError(f"{what} has shape {_shown(logits)}, not (batch, classes)")
        return (found[0] if found else None) or 1

    def _two_classes(
        self, score: ir.Value, stem: str, *, probability: bool
    ) -> tuple[ir.Value, list[ir.Node]]:
        """The other class has what the one has not: `1 - p`, or a logit of 0."""
        if probability:
            one = self._constant(f"{stem}_one", np.array(1, np.float32))
            other = ir.node("Sub", [one, score])
        else:
            zero = self._constant(f"{stem}_zero", np.array(0, np.float32))
            other = ir.node("Mul", [score, zero])
        other.outputs[0].name = self._fresh(f"{stem}_other")
        both = ir.node("Concat", [other.outputs[0], score], {"axis": 1})
        return both.outputs[0], [other, both]

    def _chain(
        self,
        first: ir.Value,
        steps: Sequence[tuple[str, Mapping[str, Any], list[ir.Value]]],
        stem: str,
    ) -> tuple[ir.Value, list[ir.Node]]:
        """One node after the other; what the last one gives, and all of them."""
        value = first
        nodes = []
        for i, (op, attributes, more) in enumerate(steps):
            node = ir.node(op, [value, *more], attributes)
            value = node.outputs[0]
            value.name = self._fresh(f"{stem}_{i}")
            nodes.append(node)
        return value, nodes

    def _constant(self, stem: str, values: np.ndarray) -> ir.Value:
        name = self._fresh(stem)
        value = ir.val(name, const_value=ir.tensor(values, name=name))
        self.graph.register_initializer(value)
        return value

    def _fresh(self, stem: str) -> str:
        """A name that nothing in the graph has."""
        values = (value for node in self.graph.all_nodes() for value in node.outputs)
        taken = {value.name for value in (*values, *self.graph.inputs)} | {*self.graph.initializers}
        names = (stem, *()) if stem not in taken else (f"{stem}_{i}" for i in count(1))
        return next(name for name in names if name not in taken)


def _is_probability(value: ir.Value) -> bool:
    """Whether it is what a Sigmoid gave, whatever was done to its shape or storage since."""
    node = value.producer()
    while node is not None and node.op_type in TRANSPARENT and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in SIGMOIDS


def _require_pixels(image: ir.Value, stated: Stated, where: str) -> None:
    """A file that takes integers takes pixels as they are.

    Raises:
        InputError: the card makes other numbers of them.
    """
    if stated.pixel_range is not None and stated.pixel_range != PIXEL_RANGE:
        low, high = stated.pixel_range
        raise InputError(
            f"{where}: input {image.name!r} takes {_type(image)}, but the card makes {low:g} to"
            f" {high:g} of pixels",
            hint="write range = [0, 255] under [input] of the card, and leave out mean and std",
        )


def _batch(value: ir.Value) -> ir.SymbolicDim | int | str:
    """The first dimension; some write -1 for any."""
    first = value.shape[0] if value.shape else "batch"
    return "batch" if isinstance(first, int) and first < 1 else first


def _sizes(value: ir.Value) -> Sizes:
    """The dimensions; None for those that are open."""
    dims = value.shape if value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) and dim > 0 else None for dim in dims)


def _type(value: ir.Value) -> str:
    return "nothing" if value.dtype is None else value.dtype.name.lower()


def _shown(value: ir.Value) -> str:
    return f"({', '.join(map(str, value.shape if value.shape is not None else ()))})"


@dataclass(frozen=True, slots=True)
class SeenEnds:
    """What a file says of its ends, and of what it leaves open nothing."""

    sizes: Sizes  # of the input, without the batch
    layout: Layout  # as far as it shows
    takes: str  # the input's type
    takes_pixels: bool  # in integers
    outputs: tuple[str, ...]
    classes: int | None  # of the first output


def seen_ends(proto: onnx.ModelProto, *, where: str) -> SeenEnds:
    """What a file takes and gives, before anybody has said anything of it.

    Raises:
        InputError: it cannot be read, or takes several tensors, or no images.
    """
    with foreign_reader(f"model {where}: its ends cannot be read"):
        model = to_ir(proto)
        common.RemoveInitializersFromInputsPass()(model)
    image = _Ends(model.graph, f"model {where}").image()
    sizes, outputs = _sizes(image), tuple(model.graph.outputs)
    given = [_sizes(output) for output in outputs]
    layout = likely_layout(sizes[1:]) if len(sizes) == 4 else "channels-first"
    return SeenEnds(
        sizes[1:],
        layout,
        _type(image),
        image.dtype in PIXELS,
        tuple(str(output.name) for output in outputs),
        given[0][1] if given and len(given[0]) == 2 else None,
    )
