"""A quantized file of any maker in operators of the standard: pairs on integers, nothing fused."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qdeploy.errors import foreign_reader
from qdeploy.formats.onnx.fused_operators import to_standard
from qdeploy.formats.onnx.integer_operators import to_pairs
from qdeploy.formats.onnx.reading import check, parse_proto


def in_standard_operators(data: bytes, where: str) -> ir.Model:
    """The file's graph with its functions inlined, its constants named, and nodes in order.

    Raises:
        InputError: the file fails the check of untrusted ones, or its operators on integers do not
            fit together.
    """
    proto = parse_proto(data, where)
    check(proto, where)
    with foreign_reader(f"model {where}: cannot be turned back into floats"):
        model = ir.serde.deserialize_model(proto)
        common.InlinePass()(model)
        common.RemoveInitializersFromInputsPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.TopologicalSortPass()(model)
    with foreign_reader(f"model {where}: its operators on integers do not fit together"):
        to_pairs(model.graph, where)
        to_standard(model.graph, where)
    return model
