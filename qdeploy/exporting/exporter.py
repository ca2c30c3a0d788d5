"""Any loaded model as one prepared float32 ONNX graph, proved equal to what was loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qdeploy.errors import InputError, ProviderError, UsageError
from qdeploy.formats.onnx.fused_operators import standard
from qdeploy.formats.onnx.reading import ModelProto, check, refuse_quantized
from qdeploy.graph.ends import PIXEL_RANGE, as_classifier, seen_ends
from qdeploy.graph.io import serialize
from qdeploy.graph.prepare import interface, is_narrow, prepare
from qdeploy.messages.encoded import encode
from qdeploy.runtime.sessions import open_session
from qdeploy.values import NOTHING_STATED, SHAPE_HINT, FloatModel, Loaded, Stated

CHECKED_BATCHES = (2, 1, 5)
TOLERANCE = 1e-3  # of the largest logit
COARSE = 4  # squares along each side of an image without fine structure
LAST_DIGIT = np.array([1 - 2**-23, 1 + 2**-23], np.float32)
MAGNIFIED = 4  # times what a change of the last digit does: roundings within add to it
NARROW_TOLERANCE = 3e-2  # the same where the file computes in 16 bits

Reference = Callable[[np.ndarray], np.ndarray]


def export(
    loaded: Loaded, *, stated: Stated = NOTHING_STATED, opset: int = 21, ir_version: int = 10
) -> FloatModel:
    """The model in ONNX, prepared for quantization.

    Its outputs are compared with those of the loaded model on random inputs in batches of several
    sizes: what is judged later is what came in.

    Args:
        stated: What the ends of the model are, where the file does not say.

    Raises:
        InputError: it cannot be exported, is not a classifier, or computes something else after
            the export.
        UsageError: something must be stated, or contradicts the file.
    """
    where = loaded.origin.path
    traced = _traced(loaded, stated)
    proto = as_classifier(traced, _of_the_trace(loaded, stated), where=where)
    step, tolerance = _fixed_batch(proto), NARROW_TOLERANCE if is_narrow(proto) else TOLERANCE
    if loaded.kind == "onnx":
        reference = _onnx_reference(proto)
    else:
        from qdeploy.exporting.from_torch import torch_reference

        reference = torch_reference(loaded, stated.output)
        if proto is not traced:  # the module itself gives something else: that is what was traced
            raw = _onnx_reference(traced)
            _compare(_Compared(where, _taken(stated), raw, reference, step, tolerance))
            reference = _onnx_reference(proto)
    other = proto is not traced and seen_ends(proto, where=where) != seen_ends(traced, where=where)
    exported = replace(_prepared(proto, loaded, opset, ir_version), other_ends=other)
    got = open_session(exported.onnx, optimizations="off").logits
    _compare(
        _Compared(
            where, exported.input_shape, got, reference, step, tolerance, stated.pixel_range,
            exported.classes,
        )
    )  # fmt: skip
    return exported


def export_unproved(
    loaded: Loaded, *, stated: Stated = NOTHING_STATED, opset: int = 21, ir_version: int = 10
) -> FloatModel:
    """The same without the comparison: nothing is run that came as ONNX.

    Raises:
        InputError: it cannot be exported, or is not a classifier.
        UsageError: something must be stated, or contradicts the file.
    """
    said = _of_the_trace(loaded, stated)
    proto = as_classifier(_traced(loaded, stated), said, where=loaded.origin.path)
    return _prepared(proto, loaded, opset, ir_version)


def _traced(loaded: Loaded, stated: Stated) -> ModelProto:
    """The model in ONNX as it came or was traced."""
    where = loaded.origin.path
    if loaded.kind == "onnx":
        proto: ModelProto = loaded.content
    else:
        from qdeploy.exporting.from_torch import to_onnx

        proto = to_onnx(loaded, _taken(stated, where), stated.output)
        check(proto, where)
    refuse_quantized(proto, where)
    return proto


def _of_the_trace(loaded: Loaded, stated: Stated) -> Stated:
    """What still has to be said of the traced model: a torch module's one output is chosen."""
    return stated if loaded.kind == "onnx" else replace(stated, output=None)


def _taken(stated: Stated, where: str = "") -> tuple[int, int, int]:
    """The shape of what a torch module takes."""
    if stated.shape is None:
        raise UsageError(f"model {where}: the input shape is not known", hint=SHAPE_HINT)
    return stated.shape


def _prepared(proto: ModelProto, loaded: Loaded, opset: int, ir_version: int) -> FloatModel:
    where = loaded.origin.path
    model = prepare(standard(proto, where), opset=opset, ir_version=ir_version, where=where)
    input_name, input_shape, output_name, classes = interface(model)
    return FloatModel(
        serialize(model), loaded.origin, input_name, input_shape, output_name, classes
    )


def _onnx_reference(proto: ModelProto) -> Reference:
    """Outputs of the model as it came, without optimizations."""
    version = proto.ir_version
    proto.ir_version = min(version, 10)
    try:
        return open_session(encode(proto), optimizations="off").logits
    finally:
        proto.ir_version = version


def _fixed_batch(proto: ModelProto) -> int | None:
    """The batch size the model came with; None for any."""
    return proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """Two that should compute the same."""

    where: str
    shape: tuple[int, int, int]  # of the input
    got: Reference
    want: Reference
    step: int | None  # images at a time that `want` takes; None for any number
    tolerance: float
    pixels: tuple[float, float] | None = None  # the range of inputs, where it is stated
    classes: int | None = None  # that both must give; None: whatever they give


def _compare(pair: _Compared) -> None:
    """Run both on random images; the reference in batches it can take.

    A model may magnify the last digit of noise until it shows: untrained ones do. There is nothing
    to be seen then, and they are compared on images without fine structure, of the same contrast.

    Raises:
        InputError: they differ by more than float32 noise, or the export needs a fixed batch.
    """
    generator = np.random.default_rng(0)
    for size in CHECKED_BATCHES:
        batch = _inputs(generator, (size, *pair.shape), pair.pixels)
        if not _same(pair, batch, excused=pair.pixels != PIXEL_RANGE):
            _same(pair, _coarse(batch), excused=False)


def _same(pair: _Compared, batch: np.ndarray, *, excused: bool) -> bool:
    """Whether both answer these images alike; False if nobody could tell.

    Args:
        excused: A model whose answers change as much with the last digit of its inputs.
    """
    try:
        got = pair.got(batch)
    except ProviderError as error:
        raise InputError(
            f"model {pair.where}: cannot run a batch of {len(batch)}: {error}",
            hint="export it with a dynamic batch dimension",
        ) from error
    want = _wanted(pair, batch)
    due = want.shape if pair.classes is None else (len(batch), pair.classes)
    if got.shape != want.shape or got.shape != due or len(got) != len(batch):
        raise InputError(
            f"model {pair.where}: gives {got.shape} for a batch of {len(batch)}, not {due}",
            hint="export it with a dynamic batch dimension",
        )
    with np.errstate(all="ignore"):  # a stranger's numbers may overflow: that is no match
        difference = float(np.abs(got - want).max())
        if difference <= pair.tolerance * max(1.0, float(np.abs(want).max())):
            return True
        steady = np.array_equal(_wanted(pair, batch), want)  # it draws no numbers
        signs = np.random.default_rng(1).choice(LAST_DIGIT, batch.shape)
        restless = float(np.abs(_wanted(pair, batch * signs) - want).max())
    if excused and steady and np.isfinite(restless) and difference <= MAGNIFIED * restless:
        return False
    raise InputError(
        f"model {pair.where}: logits change by {difference:.3g} when it is exported"
        " (or are not finite)",
        hint="the model may depend on its batch, on randomness or on global state",
    )


def _wanted(pair: _Compared, batch: np.ndarray) -> np.ndarray:
    size = len(batch)
    step = pair.step or size
    parts = [batch[i : i + step] for i in range(0, size, step)]
    return np.concatenate(
        [pair.want(np.resize(part, (step, *part.shape[1:])))[: len(part)] for part in parts]
    )


def _coarse(batch: np.ndarray) -> np.ndarray:
    """The same in squares of one color."""
    rows, columns = (
        np.arange(size) // max(1, size // COARSE) * max(1, size // COARSE)
        for size in batch.shape[2:]
    )
    return np.ascontiguousarray(batch[:, :, rows][:, :, :, columns])


def _inputs(
    generator: np.random.Generator, shape: tuple[int, ...], pixels: tuple[float, float] | None
) -> np.ndarray:
    """Random images: whole numbers where a model takes pixels as they are."""
    if pixels == PIXEL_RANGE:
        return generator.integers(0, 256, shape).astype(np.float32)
    return generator.normal(size=shape).astype(np.float32)
