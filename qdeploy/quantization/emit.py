"""Write the chosen integers into a QDQ model."""

from __future__ import annotations

from collections.abc import Sequence

from qdeploy.errors import InputError
from qdeploy.graph.assemble import assemble
from qdeploy.graph.io import check_written, constant_bytes, initializers, serialize
from qdeploy.graph.qdq import stored_codes
from qdeploy.messages.encoded import LARGEST_MESSAGE_BYTES
from qdeploy.values import FloatModel, Grids, QuantizedModel, QuantPlan, RoundedLayer


def emit(
    model: FloatModel, plan: QuantPlan, grids: Grids, rounded: Sequence[RoundedLayer]
) -> QuantizedModel:
    """The quantized model, whose weights are integer initializers.

    Raises:
        PlanError: a bias does not fit into int32.
        InputError: the model does not fit into one file, which alone can be judged.
    """
    graph = assemble(model, plan, grids, {layer.name: layer for layer in rounded})
    held = constant_bytes(graph)
    if held > LARGEST_MESSAGE_BYTES:
        raise InputError(
            f"model {model.origin.path}: {held:,} bytes when it is quantized, and an ONNX file ends"
            f" at {LARGEST_MESSAGE_BYTES:,}",
            hint="use fewer bits, or let fewer layers stay float",
        )
    check_written(graph)
    return QuantizedModel(serialize(graph), tuple(rounded), plan.left_float)


def wrong_codes(written: bytes, plan: QuantPlan, rounded: Sequence[RoundedLayer]) -> int:
    """How many integers of a file are not the chosen ones. A missing weight counts whole."""
    constants = initializers(written)
    chosen = {layer.name: layer.codes for layer in rounded}
    wrong = 0
    for layer in plan.layers:
        codes = stored_codes(constants, layer.site)
        want = chosen[layer.site.name]
        if codes is None or codes.shape != want.shape:
            wrong += want.size
        else:
            wrong += int((codes != want).sum())
    return wrong
