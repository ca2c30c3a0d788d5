"""Any loaded model as one prepared float32 ONNX graph, proved equal to what was loaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qdeploy.errors import InputError, ProviderError, UsageError
from qdeploy.formats.onnx.reading import ModelProto, check, refuse_quantized
from qdeploy.graph.io import serialize
from qdeploy.graph.prepare import interface, prepare
from qdeploy.runtime.sessions import open_session
from qdeploy.values import FloatModel, Loaded

CHECKED_BATCHES = (2, 1, 5)
TOLERANCE = 1e-3  # of the largest logit

Shape = tuple[int, int, int]


Reference = Callable[[np.ndarray], np.ndarray]


def export(
    loaded: Loaded, *, shape: Shape | None, opset: int = 21, ir_version: int = 10
) -> FloatModel:
    """The model in ONNX, prepared for quantization.

    Its outputs are compared with those of the loaded model on random inputs in batches of several
    sizes: what is judged later is what came in.

    Args:
        shape: Channels, height, width of the input, where the file does not say.

    Raises:
        InputError: it cannot be exported, is not a classifier, or computes something else after
            the export.
        UsageError: `shape` is needed, or contradicts the file.
    """
    if loaded.kind == "onnx":
        reference = _onnx_reference(loaded.content)  # before it is prepared, which changes it
    else:
        from qdeploy.exporting.from_torch import torch_reference

        reference = torch_reference(loaded.content)
    proto, exported = _prepared(loaded, shape, opset, ir_version)
    _compare(exported, reference, fixed_batch=_fixed_batch(proto))
    return exported


def export_unproved(
    loaded: Loaded, *, shape: Shape | None, opset: int = 21, ir_version: int = 10
) -> FloatModel:
    """The same without the comparison: nothing is run that came as ONNX.

    Raises:
        InputError: it cannot be exported, or is not a classifier.
        UsageError: `shape` is needed, or contradicts the file.
    """
    return _prepared(loaded, shape, opset, ir_version)[1]


def _prepared(
    loaded: Loaded, shape: Shape | None, opset: int, ir_version: int
) -> tuple[ModelProto, FloatModel]:
    """The model in ONNX as it came or was traced, and prepared."""
    where = loaded.origin.path
    if loaded.kind == "onnx":
        proto = loaded.content
    else:
        if shape is None:
            raise UsageError(
                f"model {where}: the input shape is not known",
                hint="give it in a model card ([input] shape), or with --input-shape 3,32,32",
            )
        from qdeploy.exporting.from_torch import to_onnx

        proto = to_onnx(loaded, shape)
        check(proto, where)
    refuse_quantized(proto, where)
    model = prepare(proto, opset=opset, ir_version=ir_version, where=where)
    input_name, input_shape, output_name, classes = interface(model)
    if shape is not None and shape != input_shape:
        raise UsageError(f"model {where}: takes {input_shape}, not {shape} as the card says")
    exported = FloatModel(
        serialize(model), loaded.origin, input_name, input_shape, output_name, classes
    )
    return proto, exported


def _onnx_reference(proto: ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    """Outputs of the model as it came, without optimizations."""
    source = ModelProto()
    source.CopyFrom(proto)
    source.ir_version = min(source.ir_version, 10)
    return open_session(source.SerializeToString(), optimizations="off").logits


def _fixed_batch(proto: ModelProto) -> int | None:
    """The batch size the model came with; None for any."""
    return proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def _compare(
    model: FloatModel, reference: Callable[[np.ndarray], np.ndarray], *, fixed_batch: int | None
) -> None:
    """Run both on random images; the reference in batches it can take.

    Raises:
        InputError: they differ by more than float32 noise, or the export needs a fixed batch.
    """
    generator = np.random.default_rng(0)
    session = open_session(model.onnx, optimizations="off")
    for size in CHECKED_BATCHES:
        batch = generator.normal(size=(size, *model.input_shape)).astype(np.float32)
        try:
            got = session.logits(batch)
        except ProviderError as error:
            raise InputError(
                f"model {model.origin.path}: cannot run a batch of {size}: {error}",
                hint="export it with a dynamic batch dimension",
            ) from error
        step = fixed_batch or size
        parts = [batch[i : i + step] for i in range(0, size, step)]
        want = np.concatenate(
            [reference(np.resize(part, (step, *part.shape[1:])))[: len(part)] for part in parts]
        )
        if got.shape != want.shape or got.shape != (size, model.classes):
            raise InputError(
                f"model {model.origin.path}: gives {got.shape} for a batch of {size}, "
                f"not ({size}, {model.classes})",
                hint="export it with a dynamic batch dimension",
            )
        with np.errstate(all="ignore"):  # a stranger's numbers may overflow: that is no match
            difference = float(np.abs(got - want).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(want).max())):
            raise InputError(
                f"model {model.origin.path}: logits change by {difference:.3g} when it is exported"
                " (or are not finite)",
                hint="the model may depend on its batch, on randomness or on global state",
            )
