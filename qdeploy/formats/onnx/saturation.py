"""What x86 without VNNI makes of products of 8-bit integers: neighbours are added in 16 bits.

`vpmaddubsw` multiplies unsigned by signed codes and adds each pair of products along the inner axis
in 16 bits, where the sum saturates. onnxruntime's and OpenVINO's kernels for AVX2 and AVX-512 are
built on it. The inner axis of a convolution is its kernel's rows, columns and channels, those
innermost. Depthwise convolutions have other kernels, which are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qdeploy.errors import foreign_reader
from qdeploy.formats.onnx.loading import feeds_grid, readers_of, writers_of
from qdeploy.formats.onnx.nodes import constant_tensors, place
from qdeploy.formats.onnx.standard import in_standard_operators
from qdeploy.formats.onnx.tensors import values
from qdeploy.formats.onnx.versions import for_reference

LARGEST_CODE = 255
LOW, HIGH = -(1 << 15), (1 << 15) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """How a convolution takes patches of an image."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    dilations: tuple[int, int]
    groups: int

    def channels(self, inner: int) -> int:
        """How many a patch has, of `inner` codes and perhaps one more to make them even."""
        return inner // math.prod(self.kernel)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A convolution or matrix product that runs on integers."""

    name: str
    codes: str  # the tensor of uint8 that it reads
    output: str
    zero_point: int  # of the codes
    step: float  # of the codes
    scale: np.ndarray  # of a sum of products, by row
    weights: np.ndarray  # (rows, inner axis), int8; of even length
    window: Window | None  # None: a matrix product

    @property
    def saturable(self) -> np.ndarray:
        """Which pairs of products can leave 16 bits: (rows, pairs)."""
        return _beyond(self.weights, np.array(0), np.array(LARGEST_CODE))


def _beyond(weights: np.ndarray, smallest: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Which pairs of products with codes between these leave 16 bits: (rows, pairs)."""
    pairs = weights.reshape(len(weights), -1, 2).astype(np.int32)
    ends = pairs * smallest, pairs * largest
    most, least = np.maximum(*ends).sum(-1), np.minimum(*ends).sum(-1)
    found: np.ndarray = (most > HIGH) | (least < LOW)
    return found


def products(proto: onnx.ModelProto) -> Iterator[Product]:
    """Those of a graph of standard operators whose integers onnxruntime multiplies as they are."""
    constants = constant_tensors(proto)
    makers, readers = writers_of(proto.graph.node), readers_of(proto.graph.node)
    for node in proto.graph.node:
        if node.op_type in {"Conv", "Gemm", "MatMul"} and len(node.input) > 1 and node.output:
            codes, weight = (makers.get(name) for name in node.input[:2])
            if codes is None or weight is None:
                continue
            found = _product(node, codes, weight, constants)
            # only where the result is put on a grid a convolution runs on integers
            if found is not None and (node.op_type != "Conv" or feeds_grid(node, readers, makers)):
                yield found


def _product(
    node: onnx.NodeProto,
    codes: onnx.NodeProto,
    weight: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
) -> Product | None:
    of_codes, of_weight = (_grid(maker, constants) for maker in (codes, weight))
    held = values(constants[weight.input[0]]) if weight.input[0] in constants else None
    if of_codes is None or of_weight is None or held is None or held.dtype != np.int8:
        return None
    (scale, zero), (scales, _) = of_codes, of_weight
    if scale.size != 1 or zero.dtype != np.uint8:
        return None
    window = _window(node, held) if node.op_type == "Conv" else None
    if node.op_type == "Conv" and (window is None or _depthwise(window, held)):
        return None
    if held.ndim != (4 if window else 2):
        return None
    if window:
        rows = held.transpose(0, 2, 3, 1).reshape(len(held), -1)
    else:
        attributes = {a.name: a.i for a in node.attribute}
        rows = held if node.op_type == "Gemm" and attributes.get("transB") else held.T
    if scales.size not in {1, len(rows)}:
        return None
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    sums = np.broadcast_to(scale.reshape(-1) * scales.reshape(-1), len(rows))
    return Product(
        place(node),
        codes.input[0],
        node.output[0],
        int(zero.reshape(-1)[0]),
        float(scale.reshape(-1)[0]),
        sums,
        rows,
        window,
    )


def _grid(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a DequantizeLinear that has both as constants."""
    if node.op_type != "DequantizeLinear" or len(node.input) < 2:
        return None
    found = [values(constants[name]) for name in node.input[1:3] if name in constants]
    scale = found[0] if found else None
    zero = found[1] if len(found) > 1 else np.zeros(1, np.int8)
    return None if scale is None or zero is None else (scale.astype(np.float32), zero)


def _window(node: onnx.NodeProto, weight: np.ndarray) -> Window | None:
    given = {a.name: list(a.ints) or a.i for a in node.attribute if a.name != "auto_pad"}
    automatic = any(a.name == "auto_pad" and a.s not in {b"", b"NOTSET"} for a in node.attribute)
    if weight.ndim != 4 or automatic:
        return None
    pads = given.get("pads", [0, 0, 0, 0])
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    return Window(kernel, tuple(strides), tuple(pads), tuple(dilations), given.get("group", 1))  # type: ignore[arg-type]


def _depthwise(window: Window, weight: np.ndarray) -> bool:
    return window.groups > 1 and weight.shape[1] == 1


@dataclass(frozen=True, slots=True)
class Saturable:
    """How much of a file can saturate."""

    pairs: int
    of: int
    channels: int
    of_channels: int
    layers: tuple[str, ...]  # that have such pairs, those with most first

    @property
    def text(self) -> str:
        """In a few words."""
        if not self.pairs:
            return f"none of {self.of:,} pairs of products"
        return (
            f"{100 * self.pairs / self.of:.1f} % of {self.of:,} pairs of products, in"
            f" {self.channels:,} of {self.of_channels:,} channels of {len(self.layers)} layers"
        )


def saturable(data: bytes, where: str) -> Saturable:
    """Which pairs of products can saturate on x86 without VNNI; nothing is run.

    Raises:
        InputError: it is no file to be opened.
    """
    found = [(one.name, one.saturable) for one in products(_standard(data, where))]
    layers = sorted((-int(which.sum()), name) for name, which in found)
    return Saturable(
        sum(int(which.sum()) for _, which in found),
        sum(which.size for _, which in found),
        sum(int(which.any(axis=1).sum()) for _, which in found),
        sum(len(which) for _, which in found),
        tuple(name for count, name in layers if count),
    )


def _standard(data: bytes, where: str) -> onnx.ModelProto:
    return ir.serde.serialize_model(in_standard_operators(data, where))


EMULATION, LOSS = "qdeploy.emulation", "SaturationLoss"


def with_losses(data: bytes, where: str) -> tuple[onnx.ModelProto, tuple[Product, ...]]:
    """The file in standard operators, with a node behind each product that can saturate.

    It is in a version of the standard that the reference evaluator knows.

    Each is of an operator `SaturationLoss(result, codes)` of a domain of its own, whose attribute
    `product` counts the products that are given too.

    Raises:
        InputError: it is no file to be opened.
    """
    with foreign_reader(f"model {where}"):
        proto = for_reference(_standard(data, where))
    found = tuple(one for one in products(proto) if one.saturable.any())
    by_output = {one.output: i for i, one in enumerate(found)}
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        name = node.output[0] if node.output else ""
        if name not in by_output or node.op_type not in {"Conv", "Gemm", "MatMul"}:
            continue
        index = by_output[name]
        exact = f"{name}.exact"
        while exact in taken:  # the file's author chooses its names
            exact += "_"
        taken.add(exact)
        node.output[0] = exact
        behind = onnx.NodeProto(op_type=LOSS, domain=EMULATION, output=[name])
        behind.input.extend([exact, found[index].codes])
        behind.attribute.add(name="product", i=index, type=onnx.AttributeProto.INT)
        nodes.append(behind)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.opset_import.add(domain=EMULATION, version=1)
    return proto, found


def lost(product: Product, codes: np.ndarray) -> np.ndarray:
    """What saturation takes from the exact sums, as floats: of the shape of the result.

    Args:
        codes: (images, channels, height, width), or (..., inner axis) of a matrix product.
    """
    if product.window is None:
        flat = codes.reshape(-1, codes.shape[-1])
        return _excess(flat, product.weights, product.scale).reshape(*codes.shape[:-1], -1)
    patches, height, width = _patches(product, codes)
    each = len(product.weights) // product.window.groups
    parts = [
        _excess(patches[g], product.weights[rows], product.scale[rows])
        for g in range(product.window.groups)
        for rows in (slice(g * each, (g + 1) * each),)
    ]
    sums = np.concatenate(parts, axis=1)
    return sums.reshape(len(codes), height, width, -1).transpose(0, 3, 1, 2)


def _patches(product: Product, codes: np.ndarray) -> tuple[list[np.ndarray], int, int]:
    """By group: (images x places, kernel rows x columns x channels); the size of the result."""
    window = product.window
    assert window is not None  # noqa: S101 - a convolution
    top, left, bottom, right = window.pads
    padded = np.pad(
        codes, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=product.zero_point
    )
    reach = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, tuple(reach), axis=(2, 3))
    views = views[:, :, :: window.strides[0], :: window.strides[1]]
    views = views[..., :: window.dilations[0], :: window.dilations[1]]
    _, channels, height, width = views.shape[:4]
    each = channels // window.groups
    inner = math.prod(window.kernel) * each
    return [
        views[:, g * each : (g + 1) * each].transpose(0, 2, 3, 4, 5, 1).reshape(-1, inner)
        for g in range(window.groups)
    ], height, width  # fmt: skip


def _excess(flat: np.ndarray, weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(places, inner axis) by (rows, inner axis): sums beyond 16 bits, pair by pair, scaled."""
    odd = weights.shape[1] - flat.shape[1]
    flat = np.pad(flat, ((0, 0), (0, odd)))
    ends = [end.astype(np.int32).reshape(-1, 2) for end in (flat.min(0), flat.max(0))]
    found = np.zeros((len(flat), len(weights)), np.float32)
    for row, which in enumerate(_beyond(weights, *ends)):
        pairs = np.flatnonzero(which)
        if not len(pairs):
            continue
        first, second = (flat[:, 2 * pairs + i].astype(np.int32) for i in (0, 1))
        sums = first * weights[row, 2 * pairs] + second * weights[row, 2 * pairs + 1]
        found[:, row] = (sums - sums.clip(LOW, HIGH)).sum(axis=1) * scale[row]
    return found
