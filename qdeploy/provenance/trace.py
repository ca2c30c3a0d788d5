"""How a quantized file came about: is it its float model's network, and how was it rounded?

A file that somebody else has rounded can carry a backdoor in its roundings alone, and rounding that
is not to nearest is what that takes. Nothing is run here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32

from qdeploy.errors import InputError
from qdeploy.graph.io import parse
from qdeploy.provenance.canonical import RULE, LayerPair, compare
from qdeploy.provenance.clips import RANGE_OP
from qdeploy.provenance.placed import Placed, TensorIndex
from qdeploy.provenance.stored import StoredTensor, with_constants
from qdeploy.provenance.unquantize import RoundedNorm, unquantize
from qdeploy.values import Finding, FloatModel

# Steps: nearer to the middle of two codes than this either is nearest. Float noise is below 1e-4 at
# 8 bits; attacks keep weights 1e-3 away from the middle, and what was flipped there must count.
TIE = 2e-4
FEW = 0.001  # share of flips that rounding to nearest may show; honest files show none
MOST_BIAS_SHIFT = 2.0  # corrections of rounding reached 0.65
NOISE = 1e-3  # of a step, or of the largest of the weights that a file keeps in floats


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """How one weight of a file came about."""

    name: str  # the source's layer
    shape: tuple[int, ...]
    storage: str  # int4, int8, uint8, ...
    bits: int  # that the range of the codes needs
    weights: int
    flipped: float  # share of codes that are not nearest to the source's weight on the file's grid
    steps: float  # largest |file - source|, in steps; 1 or more: not a rounding of the source
    saturated: int  # weights beyond the grid's ends, which `steps` leaves out
    bias_shift: float  # largest |bias - source's|, over the rms of the channels' weight norms
    rounded_at_load: bool  # the file holds floats, which the runtime rounds to nearest
    codes_sha256: str  # little-endian int32, in the layout of the source's weight
    scales_sha256: str  # little-endian float32 scales, int32 zero points

    @property
    def changed(self) -> bool:
        """Whether some weight is no neighbour of the source's: more than a rounding."""
        return self.steps > 1 + NOISE

    @property
    def nearest_rounded(self) -> bool:
        """Whether the source was rounded to nearest."""
        return self.flipped < FEW and not self.changed


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a quantized file has in common with a float model."""

    layers: tuple[LayerTrace, ...]
    differences: tuple[Finding, ...]
    not_compared: str | None  # why not, if the file could not be compared at all
    nearest: bytes | None  # the file, had its maker rounded to nearest; None: it is that
    cut_at_zero: tuple[str, ...] = ()  # the source's tensors that lose negative values to a range

    @property
    def weights(self) -> int:
        """In all traced layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def flipped(self) -> float:
        """Share of all codes that are not nearest to the source's weights; nan without layers."""
        if not self.layers:
            return float("nan")
        return sum(layer.flipped * layer.weights for layer in self.layers) / self.weights

    @property
    def steps(self) -> float:
        """Largest change of a weight, in steps of its grid."""
        return max((layer.steps for layer in self.layers), default=0.0)

    @property
    def same_network(self) -> bool:
        """Compared, and nothing but roundings found."""
        changed = any(layer.changed for layer in self.layers)
        return self.not_compared is None and not self.differences and not changed

    @property
    def nearest_rounded(self) -> bool:
        """The same network, rounded to nearest in every layer."""
        return self.same_network and all(layer.nearest_rounded for layer in self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class _Rounding:
    """One weight on the file's grid, in the source's layout."""

    codes: Int32[np.ndarray, "*shape"]
    nearest: Int32[np.ndarray, "*shape"]
    flipped: Bool[np.ndarray, "*shape"]
    distance: Float64[np.ndarray, "*shape"]  # steps between file and source; nan: beyond the grid
    bits: int


def trace(data: bytes, model: FloatModel) -> Provenance:
    """Compare a file with the float model that it claims to be the quantized form of.

    Args:
        data: An ONNX file of any maker, in QuantizeLinear and DequantizeLinear.
        model: The prepared source.
    """
    source = parse(model.onnx)
    if any(node.op_type == RANGE_OP for node in source.graph):
        return Provenance((), (), f"the source holds {RANGE_OP}, which is not compared", None)
    try:
        found = unquantize(
            data, opset=source.opset_imports[""], ir_version=source.ir_version, where="quantized"
        )
    except InputError as error:
        return Provenance((), (), str(error), None)
    index = TensorIndex(found.tensors)
    compared = compare(source, found.twin, index.step_of)
    layers: list[LayerTrace] = []
    otherwise: list[tuple[Placed, np.ndarray]] = []
    floats: list[Finding] = []
    for pairs in _by_layer(compared.layers, index):
        pair, placed = pairs[0]
        if placed is None:
            floats += [f for p, _ in pairs for f in _compare_floats(p, found.norms, index)]
            continue
        rounding = _rounding(pair, placed)
        shift = max(_bias_shift(p) for p, _ in pairs)
        if shift > MOST_BIAS_SHIFT:
            text = f"a bias of {pair.node!r} is moved by {shift:.3g} times what its weights add"
            floats.append(Finding(RULE, "error", pair.node, text))
        again = any(layer.name == pair.site.name for layer in layers)
        name = pair.node if again else pair.site.name
        layers.append(_layer(name, placed, rounding, shift))
        if rounding.flipped.any():  # all else of a rounding is let go: it is as large as the layer
            otherwise.append((placed, rounding.nearest))
    differences = (*compared.differences, *floats)
    nearest = _nearest_file(data, otherwise)
    return Provenance(tuple(layers), differences, None, nearest, compared.cut_at_zero)


def _by_layer(
    pairs: Iterable[LayerPair], index: TensorIndex
) -> list[list[tuple[LayerPair, Placed | None]]]:
    """Uses of one weight that read the same integers of the file, together."""
    groups: dict[tuple[str, int | None], list[tuple[LayerPair, Placed | None]]] = {}
    for pair in pairs:
        placed = index.find(pair.weight, pair.site.axis)
        key = pair.site.name, None if placed is None else id(placed.tensor)
        groups.setdefault(key, []).append((pair, placed))
    return list(groups.values())


def _compare_floats(
    pair: LayerPair, norms: Iterable[RoundedNorm], index: TensorIndex
) -> Iterator[Finding]:
    """What is wrong with a weight that the file keeps in floats, and with what is added to it.

    One that was a BatchNormalization, its constants rounded on grids of their own, may be as far
    away as that brings it.
    """
    flat = pair.weight.ravel()
    one_each = pair.weight.shape[:1] == flat.shape  # as a BatchNormalization has, one a channel
    norm = next((n for n in norms if one_each and np.array_equal(n.weight, flat)), None)
    reach = 0.0 if norm is None else norm.weight_reach.reshape(pair.weight.shape)
    far = np.abs(pair.weight - pair.source_weight)
    if np.any(far > reach + NOISE * np.abs(pair.source_weight).max(initial=0)):
        text = f"the weight of {pair.node!r} is no integers in the file, and {far.max():.3g} away"
        yield Finding(RULE, "error", pair.node, text)
    have, want = (np.float32(0) if b is None else b for b in (pair.bias, pair.source_bias))
    moved = np.abs(np.subtract(have, want))
    room = 0.0 if norm is None else norm.bias_reach
    if pair.bias is not None:
        room = room + index.step_of(pair.bias)
    if np.any(moved > room + NOISE * max(np.abs(want).max(initial=0), np.abs(flat).max(initial=0))):
        text = (
            f"the bias of {pair.node!r}, which is in floats in the file, is {moved.max():.3g} away"
        )
        yield Finding(RULE, "error", pair.node, text)


def _rounding(pair: LayerPair, placed: Placed) -> _Rounding:
    """The file's codes beside the nearest ones, by the arithmetic of the runtime.

    A code that differs where the source lies in the middle of two codes, within `TIE`, is nearest
    too: a BatchNorm folded in another order moves it there.
    """
    codes, scale, zero_point = placed.codes, placed.scale, placed.zero_point
    grid_values = (codes - zero_point).astype(np.float32)
    dead = (placed.factor == 0) & (pair.source_weight == 0)  # times 0: in source and file alike
    x = pair.source_weight / np.where(placed.factor == 0, np.float32(1), placed.factor) / scale
    x = np.where(dead, grid_values, x)
    low, high, bits = _limits(codes, placed.tensor)
    nearest = np.clip(np.rint(x).astype(np.float64) + zero_point, low, high).astype(np.int32)
    at_tie = np.abs(x - np.floor(x) - 0.5) <= TIE
    flipped = (codes != nearest) & ~(at_tie & (np.abs(codes - nearest) == 1))
    beyond = (x < low - zero_point - 0.5 - TIE) | (x > high - zero_point + 0.5 + TIE)
    distance = np.abs(grid_values.astype(np.float64) - x)
    return _Rounding(codes, nearest, flipped, np.where(beyond, np.nan, distance), bits)


def _limits(codes: Int32[np.ndarray, "*shape"], tensor: StoredTensor) -> tuple[int, int, int]:
    """Lowest and highest code of the grid in use, and its bits: 4 may be stored in 8.

    A grid around 0 that does not use its lowest code has as many codes below 0 as above.
    """
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if tensor.grid.least == 0:
        bits = max(high.bit_length(), 1)
        return 0, 2**bits - 1, bits
    bits = max((-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1
    most = 2 ** (bits - 1) - 1
    symmetric = not np.any(tensor.grid.zero_point) and low >= -most
    return -most if symmetric else -most - 1, most, bits


def _bias_shift(pair: LayerPair) -> float:
    """Largest |difference| of the biases, over what inputs of variance 1 add to a channel."""
    if pair.bias is None and pair.source_bias is None:
        return 0.0
    have, want = (0.0 if b is None else b.astype(np.float64) for b in (pair.bias, pair.source_bias))
    channels = pair.site.shape[pair.site.axis]
    norm = float(np.sqrt(np.square(pair.source_weight, dtype=np.float64).sum() / channels))
    shift = float(np.abs(np.subtract(have, want)).max())
    return shift / norm if norm else (float("inf") if shift else 0.0)


def _layer(name: str, placed: Placed, rounding: _Rounding, shift: float) -> LayerTrace:
    distance = rounding.distance[np.isfinite(rounding.distance)]
    return LayerTrace(
        name=name,
        shape=rounding.codes.shape,
        storage=placed.tensor.grid.storage,
        bits=rounding.bits,
        weights=rounding.codes.size,
        flipped=int(rounding.flipped.sum()) / max(rounding.codes.size, 1),
        steps=float(distance.max(initial=0)),
        saturated=rounding.distance.size - distance.size,
        bias_shift=shift,
        rounded_at_load=placed.tensor.rounded_at_load,
        codes_sha256=hashlib.sha256(rounding.codes.astype("<i4").tobytes()).hexdigest(),
        scales_sha256=placed.tensor.grid.sha256,
    )


def _nearest_file(data: bytes, otherwise: list[tuple[Placed, np.ndarray]]) -> bytes | None:
    """The file with the nearest codes in every layer that has others; None without any."""
    constants: dict[str, np.ndarray] = {}
    for placed, nearest in otherwise:
        tensor = placed.tensor
        codes = placed.unplace(nearest)
        values = tensor.grid.floats(codes) if tensor.rounded_at_load else codes
        known = constants.setdefault(tensor.name, values)
        if not np.array_equal(known, values):
            return None  # layers that share the integers were made from different weights
    return with_constants(data, constants) if constants else None
