"""Integer weights and their grids: what no quantizer would have left there.

A quantizer that takes its scale from a channel's largest magnitude lets every channel that is not
zero reach the end of the grid: 127, or 7 for 4 bits, whichever type stores them. So a single code
behind that end, or a channel that stays far from it, was put there by something else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from qdeploy.formats.onnx.loading import rounded_when_loaded
from qdeploy.formats.onnx.nodes import constant_tensors, place
from qdeploy.formats.onnx.tensors import all_nodes, all_tensors, values
from qdeploy.messages.encoded import decode
from qdeploy.values import STANDARD_DOMAINS, Finding

RULES = {
    "bad-scale": "A scale is 0 or no finite number.",
    "code-off-grid": "Single integers lie behind the end of the grid that all others keep to.",
    "mixed-zero-points": "A few channels of a weight have another zero point than the rest.",
    "scale-outlier": "A channel's scale is far larger than its integers need.",
    "rounded-when-loaded": "onnxruntime rounds these float weights itself, to nearest, unseen.",
}
SIGNED = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.INT16})
UNSIGNED = frozenset({onnx.TensorProto.UINT4, onnx.TensorProto.UINT8, onnx.TensorProto.UINT16})
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
FEWEST_CHANNELS = 10  # to say where a grid ends; smaller weights are judged together
FEW = 0.125  # share of the zero points that may be called exceptions
ALIKE = 3  # channels that end where they should below 0, for each one that goes further
NARROW = 8  # times below the end of the grid: a channel that does not use it
FAR = 100  # times the median scale
Ends = dict[tuple[object, ...], "tuple[np.ndarray, np.ndarray] | None"]
LARGE_BIAS = 1 << 29  # quantizers widen a channel's scale until its bias fits into 32 bits


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """An integer weight, told by the ends of its rows: one row for each of its scales."""

    name: str
    tensor: onnx.TensorProto
    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    widened: np.ndarray  # rows whose scale is that of a large bias

    @property
    def reach(self) -> np.ndarray:
        """The largest distance of each row's codes from its zero point; 0 for a row of zeros."""
        return np.maximum(self.high - self.zero_point, self.zero_point - self.low)

    def beyond(self, end: int) -> tuple[int, int]:
        """How many of its codes lie beyond `end`, and of how many; the codes are read for it."""
        if (self.low >= -end).all() and (self.high <= end).all():
            return 0, 0
        codes = _codes(self.tensor)
        assert codes is not None  # noqa: S101 - its ends are known
        return int(np.count_nonzero(codes > end) + np.count_nonzero(codes < -end)), codes.size


def integer_weights(proto: onnx.ModelProto) -> Iterator[Finding]:
    """What is odd about the codes, scales and zero points of the model's integer weights."""
    for node in rounded_when_loaded(all_nodes(proto)):
        text = (
            f"{node.op_type} {place(node)!r} has float weights between integers: onnxruntime rounds"
            " them to nearest, per tensor, when it loads the file"
        )
        yield Finding("rounded-when-loaded", "warning", place(node), text)
    found = list(_weights(proto))
    yield from _codes_off_grid(found)
    for weight in found:
        yield from _mixed_zero_points(weight)
        yield from _scale_outliers(weight)


def products_fit(data: bytes, largest: int) -> bool:
    """Whether no product of a well-formed file has a signed 8-bit code beyond `largest` in it.

    Known only of pairs: integers are constants of the file, or what a QuantizeLinear to uint8
    makes, and DequantizeLinear alone reads them. Of all else it is not known, and False: of codes
    that are computed, cast, or rounded when the file is loaded.
    """
    proto = decode(data)
    constants = constant_tensors(proto)
    nodes = list(all_nodes(proto))
    if next(rounded_when_loaded(nodes), None) is not None:
        return False
    unsigned = {node.output[0] for node in nodes if _to_uint8(node, constants)}
    for node in nodes:
        if node.op_type == "DequantizeLinear":
            known = node.input[0] in unsigned or node.input[0] in constants
        elif node.op_type == "QuantizeLinear":
            known = node.output[0] in unsigned
        else:
            known = not node.op_type.startswith("QLinear") and "Integer" not in node.op_type
        if not known or node.domain not in STANDARD_DOMAINS:
            return False
    return all(
        (codes := values(tensor)) is not None and not np.any((codes > largest) | (codes < -largest))
        for tensor in all_tensors(proto)
        if tensor.data_type == onnx.TensorProto.INT8
    )


def _to_uint8(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it is a QuantizeLinear whose zero point says so."""
    if node.op_type != "QuantizeLinear" or len(node.input) < 3 or not node.output:
        return False
    zero = constants.get(node.input[2])
    return zero is not None and zero.data_type == onnx.TensorProto.UINT8


def bad_scales(proto: onnx.ModelProto) -> Iterator[Finding]:
    """Scales that no quantizer could have meant.

    A negative one is meant: block quantizers give the value of largest magnitude the lowest code.
    """
    constants = constant_tensors(proto)
    names = {
        node.input[1]
        for node in proto.graph.node
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and len(node.input) > 1
    }
    for name in sorted(names & constants.keys()):
        scale = values(constants[name])
        if scale is None or scale.dtype.kind != "f":
            continue  # not one of numpy's own types: narrower floats cannot be compared here
        bad = int(np.count_nonzero((scale == 0) | ~np.isfinite(scale)))
        if bad:
            text = f"{bad} of {scale.size} scales in {name!r} are 0 or no finite numbers"
            yield Finding("bad-scale", "error", name, text)


def _weights(proto: onnx.ModelProto) -> Iterator[Weight]:
    """No codes are kept, and those of a tensor with many readers are looked at once."""
    constants = constant_tensors(proto)
    known: Ends = {}
    biases = _large_biases(proto.graph.node, constants)
    added = _read_elementwise(proto.graph.node)
    for node in proto.graph.node:
        tensor = constants.get(node.input[0]) if node.input else None
        dequantizes = node.op_type == "DequantizeLinear" and len(node.input) > 1 and node.output
        if tensor is None or not dequantizes:
            continue
        if tensor.data_type in SIGNED | UNSIGNED and added.isdisjoint(node.output):
            weight = _weight(node, tensor, constants, biases, known)
            if weight is not None:
                yield weight


def _read_elementwise(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Constants that are summands or factors: those have the grids of activations."""
    return {name for node in nodes if node.op_type in ELEMENTWISE for name in node.input}


def _weight(
    node: onnx.NodeProto,
    tensor: onnx.TensorProto,
    constants: Mapping[str, onnx.TensorProto],
    biases: Mapping[str, np.ndarray],
    known: Ends,
) -> Weight | None:
    """The weight that a node reads; None if it is no constant one whose parts fit each other."""
    scale = None if node.input[1] not in constants else values(constants[node.input[1]])
    if scale is None:
        return None
    key = (
        node.input[0],
        scale.shape,
        *(_attribute(node, name, -1) for name in ("axis", "block_size")),
    )
    if key not in known:
        known[key] = _ends(node, tensor, scale)
    zero, ends = _zero_points(node, constants, scale), known[key]
    if zero is None or ends is None or len(ends[0]) != scale.size:
        return None
    large = biases.get(node.output[0])
    widened = large if large is not None and large.size == scale.size else np.zeros(scale.size, "?")
    flat = scale.astype(np.float64).ravel() if scale.ndim < 2 else _block_rows(node, scale, 1)
    points = zero.ravel() if zero.ndim < 2 else _block_rows(node, zero, 1)
    return Weight(node.input[0], tensor, *ends, flat.ravel(), points.ravel(), widened)


def _ends(
    node: onnx.NodeProto, tensor: onnx.TensorProto, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The lowest and the highest code of each row; None if the scales do not fit the codes."""
    codes = _codes(tensor)
    rows = None if codes is None or not codes.size else _rows(node, codes, scale)
    if rows is None:
        return None
    return rows.min(axis=1).astype(np.int64), rows.max(axis=1).astype(np.int64)


def _codes(tensor: onnx.TensorProto) -> np.ndarray | None:
    """The integers, in one of numpy's own types."""
    codes = values(tensor)
    return codes if codes is None or codes.dtype.kind in "iu" else codes.astype(np.int8)


def _zero_points(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], scale: np.ndarray
) -> np.ndarray | None:
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(scale.shape, np.int64)
    tensor = constants.get(node.input[2])
    zero = None if tensor is None else values(tensor)
    return None if zero is None or zero.shape != scale.shape else zero.astype(np.int64)


def _rows(node: onnx.NodeProto, codes: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """The codes with one row per scale, in the order of the scales; None if they do not fit."""
    if scale.size == 1:
        return codes.reshape(1, -1)
    axis = _attribute(node, "axis", 1)
    if not -codes.ndim <= axis < codes.ndim:
        return None
    if scale.ndim == 1:
        moved = np.moveaxis(codes, axis, 0)
        return moved.reshape(len(moved), -1)
    block = _attribute(node, "block_size", 0)
    if block < 1 or codes.shape[axis] % block:
        return None
    return _block_rows(node, codes, block)


def _block_rows(node: onnx.NodeProto, array: np.ndarray, block: int) -> np.ndarray:
    return np.moveaxis(array, _attribute(node, "axis", 1), -1).reshape(-1, block)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _large_biases(
    nodes: Iterable[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> dict[str, np.ndarray]:
    """For each weight that goes with an integer bias: which of the bias's codes are large."""
    by_output = {
        node.output[0]: node.input[0]
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input and node.output
    }
    found = {}
    for node in nodes:
        if node.op_type not in {"Conv", "Gemm"} or len(node.input) < 3:
            continue
        tensor = constants.get(by_output.get(node.input[2], ""))
        codes = None if tensor is None else values(tensor)
        if codes is not None and codes.dtype == np.int32:
            found[node.input[1]] = np.abs(codes.astype(np.int64)).ravel() >= LARGE_BIAS
    return found


def _codes_off_grid(found: list[Weight]) -> Iterator[Finding]:
    """Weights of few channels, or of one scale, are judged together with others of their type."""
    pools = defaultdict(list)
    for weight in found:
        kind = weight.tensor.data_type
        if kind in SIGNED and not weight.zero_point.any():
            alone = len(weight.low) >= FEWEST_CHANNELS
            pools[weight.name if alone else kind].append(weight)
    for pool in pools.values():
        low = np.concatenate([weight.low[~weight.widened] for weight in pool])
        high = np.concatenate([weight.high[~weight.widened] for weight in pool])
        end = _end_of_grid(low, high)
        if end is None:
            continue
        for weight in pool:
            beyond, size = weight.beyond(end)
            if beyond:
                text = (
                    f"{beyond} of {size} codes of {weight.name!r} lie beyond {end},"
                    " where the grid of the others ends"
                )
                yield Finding("code-off-grid", "warning", weight.name, text)


def _end_of_grid(low: np.ndarray, high: np.ndarray) -> int | None:
    """Where most channels end; None if they do not agree, or many go further.

    Only 2^k - 1 and 2^k are taken for ends: quantizers use no others. Some quantizers take half a
    step more, so that channels that reach further down than up end at -2^k, the others at 2^k - 1:
    no exceptions there. Where these are exceptions, others end at -(2^k - 1).
    """
    reach = np.maximum(high, -low)
    if np.count_nonzero(reach) < FEWEST_CHANNELS:
        return None
    end, count = Counter(reach[reach > 0].tolist()).most_common(1)[0]
    further = np.count_nonzero(reach > end)
    whole = end.bit_count() == 1 or (end + 1).bit_count() == 1
    most = 2 * count > np.count_nonzero(reach)
    alone = ALIKE * further <= np.count_nonzero(low == -end)
    return int(end) if whole and most and alone else None


def _mixed_zero_points(weight: Weight) -> Iterator[Finding]:
    usual, count = Counter(weight.zero_point.tolist()).most_common(1)[0]
    others = weight.zero_point.size - count
    if 0 < others <= FEW * weight.zero_point.size:
        text = (
            f"{others} of {weight.zero_point.size} zero points of {weight.name!r} are not {usual}"
            " like the others"
        )
        yield Finding("mixed-zero-points", "warning", weight.name, text)


def _scale_outliers(weight: Weight) -> Iterator[Finding]:
    """A row of zeros may have any scale; the smallest normal number is one of necessity."""
    reach, scale = weight.reach, np.abs(weight.scale)
    free = (reach > 0) & ~weight.widened & (scale > np.finfo(np.float32).tiny)
    if len(reach) < 2 or not free.any():
        return
    end = int(reach.max())
    narrow = reach * NARROW < end
    far = (scale > FAR * np.median(scale[reach > 0])) & (reach * 2 < end)
    rows = np.flatnonzero(free & (narrow | far))
    if rows.size:
        worst = rows[np.argmin(reach[rows])]
        text = (
            f"{rows.size} of {len(reach)} channels of {weight.name!r} do not use their scale:"
            f" channel {worst} reaches {reach[worst]} of {end}"
        )
        yield Finding("scale-outlier", "warning", weight.name, text)
